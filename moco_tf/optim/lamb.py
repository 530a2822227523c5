"""LAMB: AdamW whose steps are scaled layer by layer, for batches of many thousands."""

from moco_tf import addons
from moco_tf.optim.exclude import excluded


class LAMB(addons.LAMB):
    """LAMB (arXiv:1904.00962) of TensorFlow Addons, called as our own optimizers are.

    A step that was skipped for a non-finite gradient counts into the corrections of its averages, unlike in `AdamW`.

    Args:
        learning_rate: a float or a `LearningRateSchedule`.
        weight_decay: times the parameter, added to the step before it is scaled.
        beta_1, beta_2: of the moving averages of the gradient and its square.
        epsilon: added to the denominator.
        exclude: patterns of names of parameters with neither decay nor scaling, as for `excluded`; usually
            ("bias", "gamma", "beta").

    Raises:
        UsageError: on `build`, a pattern that matches no parameter.
    """

    def __init__(self, learning_rate, weight_decay=0.0, beta_1=0.9, beta_2=0.999, epsilon=1e-6, exclude=(),
                 name="LAMB"):
        super().__init__(learning_rate, beta_1, beta_2, epsilon, weight_decay,
                         exclude_from_weight_decay=list(exclude), name=name)

    def build(self, var_list):
        excluded(self.exclude_from_weight_decay, var_list)
        self._create_all_weights(var_list)

    def apply_gradients(self, grads_and_vars, skip_gradients_aggregation=False, **kwargs):
        return super().apply_gradients(
            grads_and_vars, experimental_aggregate_gradients=not skip_gradients_aggregation, **kwargs)
