"""LARS as MoCo v3 defines it; the learning rates of its ResNet recipes were chosen for this form."""

import tensorflow as tf

from moco_tf.optim.exclude import excluded

keras = tf.keras


class LARS(keras.optimizers.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888) by the rules of MoCo v3's code.

    Parameters of more than one axis:

        g <- g + weight_decay * p;  g <- trust * |p| / |g| * g, unless a norm is 0

    Then all of them, and those of one axis or none (BatchNorm's, biases) or with an excluded name from here on:

        buffer <- momentum * buffer + g;  p <- p - lr * buffer

    The learning rate is outside the momentum buffer, unlike in SimCLR's TensorFlow code. No epsilon, no Nesterov.

    Args:
        learning_rate: a float or a `LearningRateSchedule`.
        momentum: of the buffer.
        weight_decay: times the parameter, added to its gradient before the norm is taken.
        trust: coefficient of the ratio of norms.
        exclude: patterns of names to treat like parameters of one axis, as for `excluded`.

    Raises:
        UsageError: on `build`, a pattern that matches no parameter.
    """

    def __init__(self, learning_rate, momentum=0.9, weight_decay=0.0, trust=0.001, exclude=(), name="LARS"):
        super().__init__(name=name, weight_decay=None, jit_compile=False)    # None: Keras adds none of its own
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.momentum, self.decay, self.trust, self.exclude = momentum, weight_decay, trust, tuple(exclude)

    def build(self, var_list):
        super().build(var_list)
        if getattr(self, "buffers", None):
            return
        self.adapted = [v.shape.rank > 1 and not out for v, out in zip(var_list, excluded(self.exclude, var_list))]
        self.buffers = [self.add_variable_from_reference(v, "momentum") for v in var_list]

    def update_step(self, gradient, variable):
        position = self._index_dict[self._var_key(variable)]
        lr = tf.cast(self.learning_rate, variable.dtype)
        if self.adapted[position]:
            gradient += self.decay * variable
            norm, step_norm = tf.norm(variable), tf.norm(gradient)
            both = (norm > 0) & (step_norm > 0)
            gradient *= tf.where(both, tf.math.divide_no_nan(self.trust * norm, step_norm), 1.0)
        buffer = self.buffers[position]
        buffer.assign(self.momentum * buffer + gradient)
        variable.assign_sub(lr * buffer)

    def get_config(self):
        return {**super().get_config(), "learning_rate": self._serialize_hyperparameter(self._learning_rate),
                "momentum": self.momentum, "weight_decay": self.decay, "trust": self.trust, "exclude": self.exclude}
