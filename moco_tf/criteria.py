"""What the logits of queries cost: InfoNCE, or NCE with its constant Z, which outlives a step.

A criterion takes (N, 1 + K) logits, the positive in column 0, and returns (N,) losses in nats and what it noted on the
way, a dict of tensors; the same dict goes to further calls in the same step, to `update` once the step is known to count,
and to `metrics_of`.
"""

import math

import tensorflow as tf

from moco_tf.distribute import mean_over_replicas
from moco_tf.errors import UsageError
from moco_tf.losses import estimated_partition, followed_partition, info_nce, nce, random_partition

keras = tf.keras

LOSSES = ("softmax", "nce")
LEAST_TEMPERATURE = 0.02    # of NCE: n exp(1 / 0.01) is no float32 number any more


def make_criterion(loss, size=0, dim=0, temperature=1.0, partition_momentum=1.0, name=None):
    """The criterion of one of LOSSES; the other arguments are those of `NCE`.

    Raises:
        UsageError: another loss, a temperature that is not above 0, or "nce" without the number of images or with a
            temperature too small for Z.
    """
    if loss not in LOSSES:
        raise UsageError(f"method.loss must be one of {', '.join(LOSSES)}. Received: {loss!r}.")
    require_temperature(temperature)
    if loss == "softmax":
        return InfoNCE(name=name)
    if size < 1:
        raise UsageError(f"The loss 'nce' needs the number of training images. Received: {size}. A recipe says "
                         "method.num_images=0 for as many as there are.")
    if temperature < LEAST_TEMPERATURE:
        raise UsageError(f"The loss 'nce' keeps Z, a mean of exp(1 / temperature), and so needs a temperature of "
                         f"{LEAST_TEMPERATURE} at least. Received: {temperature}. The loss 'softmax' takes any.")
    return NCE(size, dim, temperature, partition_momentum, name=name)


def require_temperature(temperature):
    """Raises UsageError unless logits can be divided by it."""
    if not temperature > 0:
        raise UsageError(f"method.temperature divides the logits and must be above 0. Received: {temperature}. The papers' are "
                         "0.07 to 0.2, MoCo v3's ResNet has 1.")


class InfoNCE(keras.layers.Layer):
    """The cross-entropy of each query's softmax against its positive (MoCo v1, eq. 1)."""

    def __init__(self, name=None):
        super().__init__(name=name, autocast=False)    # losses stay at least float32

    def call(self, logits, noted=None):
        del noted
        losses = info_nce(logits)
        return losses, noted_of(losses)

    def update(self, noted, write):
        """There is nothing to remember."""
        del noted, write

    def metrics_of(self, noted):
        return {"positive_probability": tf.cast(noted["probability"], tf.float32)}

    def chance(self, count):
        """The loss of guessing among a positive and so many negatives."""
        return math.log(count + 1)


def noted_of(losses):
    """What `InfoNCE` notes of its losses."""
    return {"probability": tf.reduce_mean(tf.exp(-losses))}


class NCE(keras.layers.Layer):
    """Noise-contrastive estimation against n images (arXiv:1805.01978, sec. 3.2), the positive in column 0.

    Z starts unset, below 0; the first step sets it to its estimate. A step has one Z, that of its first call.

    Args:
        size: n, the number of training images.
        dim: C, the length of an embedding, and
        temperature: of the logits, both for what Z is compared with.
        partition_momentum: 1 keeps the first estimate of Z, as the reference does; 0.99 lets it follow later ones, as
            MoCo's author advises for a queue.

    Raises:
        UsageError: a partition_momentum outside 0 .. 1.
    """

    def __init__(self, size, dim, temperature, partition_momentum=1.0, name=None):
        super().__init__(name=name, dtype=keras.backend.floatx(), autocast=False)
        if not 0 <= partition_momentum <= 1:
            raise UsageError("method.partition_momentum is the share of Z that a step keeps, from 0 to 1. Received: "
                             f"{partition_momentum}. 1 keeps the first Z, 0.99 lets it follow.")
        self.size, self.at_random = size, random_partition(size, dim, temperature)
        self.partition_momentum = partition_momentum
        self.partition = self.add_weight(shape=(), initializer=keras.initializers.Constant(-1.0), name="partition",
                                         trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def call(self, logits, noted=None):
        if noted is None:
            estimate = mean_over_replicas(estimated_partition(logits, self.size))
            partition = followed_partition(self.partition, estimate, self.partition_momentum)
        else:
            partition = noted["partition"]
        probability = tf.reduce_mean(tf.exp(tf.stop_gradient(logits[:, 0]))) / partition
        return nce(logits, partition, self.size), {"partition": partition, "probability": probability}

    def update(self, noted, write):
        """Keeps this step's Z; the variable stays as it is where `write` is False."""
        self.partition.assign(tf.where(write, noted["partition"], self.partition))

    def metrics_of(self, noted):
        # Far from 1, features are not of norm 1 or Z has not been followed.
        return {"positive_probability": tf.cast(noted["probability"], tf.float32),
                "partition_ratio": tf.cast(noted["partition"] / self.at_random, tf.float32)}

    def chance(self, count):
        """As of `InfoNCE`, where every probability is 1 / n."""
        return math.log(count + 1) + count * math.log1p(1 / count)
