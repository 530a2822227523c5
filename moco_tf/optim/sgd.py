"""SGD by PyTorch's formula, which the recipes' learning rates were chosen for."""

import tensorflow as tf

keras = tf.keras


class SGD(keras.optimizers.Optimizer):
    """Momentum SGD with coupled weight decay on every parameter, the learning rate outside the momentum buffer:

        g <- g + weight_decay * p;  buffer <- momentum * buffer + g;  p <- p - lr * buffer

    Keras' own keeps lr inside its velocity, which then lags behind every change of lr, and decouples the decay.

    Args:
        learning_rate: a float or a `LearningRateSchedule`.
        momentum: of the buffer; 0 for none.
        weight_decay: times the parameter, added to its gradient, BatchNorm and biases included.
        nesterov: step along g + momentum * buffer instead.
    """

    def __init__(self, learning_rate, momentum=0.9, weight_decay=0.0, nesterov=False, name="SGD"):
        super().__init__(name=name, weight_decay=None, jit_compile=False)    # None: Keras adds none of its own
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum, self.decay, self.nesterov = momentum, weight_decay, nesterov

    def build(self, var_list):
        super().build(var_list)
        if getattr(self, "buffers", None):
            return
        self.buffers = [self.add_variable_from_reference(v, "momentum") for v in var_list]

    def update_step(self, gradient, variable):
        lr = tf.cast(self.learning_rate, variable.dtype)
        gradient += self.decay * variable
        buffer = self.buffers[self._index_dict[self._var_key(variable)]]
        if lr.shape.rank == 0:    # one kernel for both lines below, which pass over the variable four times
            tf.raw_ops.ResourceApplyMomentum(
                var=variable.handle, accum=buffer.handle, lr=lr, grad=gradient,
                momentum=tf.convert_to_tensor(self.momentum, variable.dtype), use_nesterov=self.nesterov)
        else:    # a rate for each of a grid's classifiers
            buffer.assign(self.momentum * buffer + gradient)
            variable.assign_sub(lr * (gradient + self.momentum * buffer if self.nesterov else buffer))

    def get_config(self):
        return {**super().get_config(), "learning_rate": self._serialize_hyperparameter(self._learning_rate),
                "momentum": self.momentum, "weight_decay": self.decay, "nesterov": self.nesterov}
