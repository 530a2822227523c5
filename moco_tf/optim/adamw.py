"""AdamW by PyTorch's formula, which the recipes of vision transformers were chosen for."""

import math

import tensorflow as tf

from moco_tf.optim.exclude import excluded

keras = tf.keras


class AdamW(keras.optimizers.Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), in step t counted from 1:

        p <- p * (1 - lr * weight_decay)
        m <- beta_1 * m + (1 - beta_1) * g;  v <- beta_2 * v + (1 - beta_2) * g^2
        p <- p - lr * m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)

    Keras' own adds epsilon to the uncorrected sqrt(v), which makes it larger in the first steps. A step that was
    skipped for a non-finite gradient does not count into t, as in PyTorch.

    Args:
        learning_rate: a float or a `LearningRateSchedule`.
        weight_decay: times the learning rate and the parameter, BatchNorm and biases included.
        beta_1, beta_2: of the moving averages of the gradient and its square; above 0, below 1.
        epsilon: added to the denominator.
        exclude: patterns of names of parameters without decay, as for `excluded`.

    Raises:
        UsageError: on `build`, a pattern that matches no parameter.
    """

    def __init__(self, learning_rate, weight_decay=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-8, exclude=(),
                 name="AdamW"):
        super().__init__(name=name, weight_decay=None, jit_compile=False)    # None: Keras adds none of its own
        self._learning_rate = self._build_learning_rate(learning_rate)
        self.decay, self.beta_1, self.beta_2, self.epsilon = weight_decay, beta_1, beta_2, epsilon
        self.exclude = tuple(exclude)
        self.updates = tf.Variable(0, dtype=tf.int64, trainable=False, name="updates",
                                   aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        self._variables.append(self.updates)

    def build(self, var_list):
        super().build(var_list)
        if getattr(self, "means", None):
            return
        self.decayed = [not out for out in excluded(self.exclude, var_list)]
        self.means = [self.add_variable_from_reference(v, "mean") for v in var_list]
        self.squares = [self.add_variable_from_reference(v, "square") for v in var_list]

    def apply_gradients(self, grads_and_vars, **kwargs):
        self.updates.assign_add(1)
        return super().apply_gradients(grads_and_vars, **kwargs)

    def update_step(self, gradient, variable):
        position = self._index_dict[self._var_key(variable)]
        dtype = variable.dtype
        lr, t = tf.cast(self.learning_rate, dtype), tf.cast(self.updates, dtype)
        mean, square = self.means[position], self.squares[position]
        mean.assign(self.beta_1 * mean + (1.0 - self.beta_1) * gradient)
        square.assign(self.beta_2 * square + (1.0 - self.beta_2) * tf.square(gradient))
        # 1 - beta^t; in float32 that form would lose three digits at the start, where beta is .999.
        mean_weight, square_weight = (-tf.math.expm1(t * math.log(beta)) for beta in (self.beta_1, self.beta_2))
        if self.decayed[position]:
            variable.assign_sub(lr * self.decay * variable)
        variable.assign_sub(lr / mean_weight * mean / (tf.sqrt(square / square_weight) + self.epsilon))

    def get_config(self):
        return {**super().get_config(), "learning_rate": self._serialize_hyperparameter(self._learning_rate),
                "weight_decay": self.decay, "beta_1": self.beta_1, "beta_2": self.beta_2, "epsilon": self.epsilon,
                "exclude": self.exclude}
