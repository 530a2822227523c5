"""MoCo v3 (arXiv:2104.02057, Algorithm 1): keys from the same batch, a predictor, and both views as queries."""

import math

import tensorflow as tf

from moco_tf.criteria import require_temperature
from moco_tf.distribute import first_row, gather_rows
from moco_tf.errors import UsageError
from moco_tf.losses import in_batch_logits, info_nce, positive_rank, unit
from moco_tf.methods.base import Method, accuracies, feature_std
from moco_tf.momentum import momentum_copy, momentum_update, require_momentum
from moco_tf.optim.schedules import half_cosine

keras = tf.keras

MOMENTUM_SCHEDULES = ("constant", "cosine")


class MoCoV3(Method):
    """An encoder with a predictor behind it, and its momentum encoder, which has none.

    Each view is the query of one term of the loss and the key of the other. A query's positive is the key of the other
    view of its image, its negatives are the other keys of that view, those of all replicas; there is no queue.

    Views: "view_1" and "view_2", (N, S, S, 3) each. Each is a forward pass of its own, so that BatchNorm normalises
    the views apart.

    Args:
        encoder: backbone and projector, images -> (N, C) embeddings, not normalised.
        predictor: (N, C) -> (N, C).
        temperature: divides the cosines.
        momentum: m of the momentum encoder, at the first step.
        momentum_schedule: "constant"; "cosine": from `momentum` to 1 at `total_steps`, along half a cosine.
        total_steps: of the run, for "cosine".

    Raises:
        UsageError: an unknown schedule, or "cosine" without `total_steps`; a temperature not above 0, a momentum outside
            0 .. 1.
    """

    view_names = query_names = ("view_1", "view_2")
    against_collapse = "lower the learning rate, or raise the momentum or the batch"

    def __init__(self, encoder, predictor, temperature, momentum, momentum_schedule="constant", total_steps=None,
                 **kwargs):
        super().__init__(encoder, **kwargs)
        if momentum_schedule not in MOMENTUM_SCHEDULES:
            raise UsageError(f"method.momentum_schedule must be one of {', '.join(MOMENTUM_SCHEDULES)}. "
                             f"Received: {momentum_schedule!r}.")
        if momentum_schedule == "cosine" and not total_steps:
            raise UsageError("method.momentum_schedule 'cosine' needs the number of steps of the run. "
                             f"Received: total_steps {total_steps}.")
        if encoder.output_shape[-1] != predictor.input_shape[-1]:
            raise UsageError("MoCo v3 takes an encoder of one branch, whose embeddings the predictor takes. Received: "
                             f"embeddings of {encoder.output_shape[-1]} values, a predictor of "
                             f"{predictor.input_shape[-1]}. Leave out branches, or use the method moco.")
        require_temperature(temperature)
        require_momentum(momentum)
        self.predictor = predictor
        self.key_encoder = momentum_copy(encoder)
        self.temperature, self.momentum = temperature, momentum
        self.momentum_schedule, self.total_steps = momentum_schedule, total_steps

    def encode_keys(self, views):
        momentum = self.momentum_now()
        momentum_update(self.key_encoder, self.encoder, momentum)
        here = tf.stack([unit(self.key_encoder(views[name], training=True)) for name in self.view_names], axis=1)
        keys = tf.stop_gradient(gather_rows(here))    # (B, 2, C), in rank order
        return {"view_1": keys[:, 0], "view_2": keys[:, 1], "momentum": momentum}

    def encode_queries(self, views):
        return [unit(self.predictor(self.encoder(views[name], training=True), training=True))
                for name in self.view_names]

    def compare(self, queries, keys):
        here = queries[0].shape[0]
        positive = first_row(here) + tf.range(here)
        logits = [in_batch_logits(query, keys[other], self.temperature)
                  for query, other in zip(queries, reversed(self.view_names))]
        # Times the temperature, which keeps the size of the gradients; and twice, as in the reference.
        losses = 2.0 * self.temperature * tf.add_n([info_nce(term, positive) for term in logits])
        return losses, {"queries": queries, "logits": logits,
                        "rank": tf.concat([positive_rank(term, positive) for term in logits], axis=0)}

    def metrics_of(self, keys, outputs):
        return {**accuracies(outputs["rank"]), "feature_std": feature_std(keys["view_1"]),
                "momentum": tf.cast(keys["momentum"], tf.float32)}

    def chance_loss(self, batch_size):
        return 4.0 * self.temperature * math.log(batch_size)

    def momentum_now(self):
        """m of the optimizer's step, a scalar."""
        if self.momentum_schedule == "constant":
            return self.momentum
        step = tf.cast(self.optimizer.iterations, keras.backend.floatx())
        return 1.0 - half_cosine(step, self.total_steps, 1.0 - self.momentum)
