"""Momentum Contrast v1 and v2 (arXiv:1911.05722, Algorithm 1; arXiv:2003.04297), which differ in their configs only."""

import math

import tensorflow as tf

from moco_tf.distribute import first_row, gather_rows
from moco_tf.losses import contrastive_logits, info_nce, positive_rank, unit
from moco_tf.memory import Queue
from moco_tf.methods.base import Method
from moco_tf.momentum import momentum_copy, momentum_update
from moco_tf.shuffling import key_permutation, positions


class MoCo(Method):
    """A query encoder, its momentum encoder, and a queue of the momentum encoder's keys as negatives.

    Views: "query" and "key", (N, S, S, 3) each; with `shuffle_bn="input"` also "key_position", (N,) int32: the pipeline
    has permuted the keys before it dealt them to the replicas, and says where in that order each query's key stands.

    Args:
        encoder: images -> (N, dim) embeddings, not normalised.
        dim: C, the length of an embedding.
        queue_size: K; at least one global batch.
        temperature: divides the cosines.
        momentum: m of the momentum encoder.
        shuffle_bn: "input"; "cross_replica": the step itself permutes the key images over the replicas; "none".
        bn_group_size: images that share batch statistics, for "cross_replica".
        seed: of the queue's first rows and of the permutations.
    """

    view_names = ("query", "key")

    def __init__(self, encoder, dim, queue_size, temperature, momentum, shuffle_bn="input", bn_group_size=0, seed=0,
                 **kwargs):
        super().__init__(encoder, **kwargs)
        self.key_encoder = momentum_copy(encoder)
        self.queue = Queue(queue_size, dim, seed=seed, name="queue")
        self.temperature, self.momentum = temperature, momentum
        self.shuffle_bn, self.bn_group_size, self.seed = shuffle_bn, bn_group_size, seed

    def encode_keys(self, views):
        momentum_update(self.key_encoder, self.encoder, self.momentum)
        images, position = self._shuffled(views)
        encoded = gather_rows(unit(self.key_encoder(images, training=True)))    # of all replicas, as shuffled
        keys = tf.stop_gradient(tf.gather(encoded, gather_rows(position)))      # in the order of the queries again
        here = images.shape[0]
        return {"all": keys, "positive": keys[first_row(here):][:here], "negatives": tf.convert_to_tensor(self.queue.keys)}

    def contrastive_loss(self, views, keys):
        queries = unit(self.encoder(views["query"], training=True))
        logits = contrastive_logits(queries, keys["positive"], keys["negatives"], self.temperature)
        return info_nce(logits), {"queries": queries, "logits": logits}

    def update_memory(self, keys, outputs, write):
        self.queue.enqueue(keys["all"], write)

    def metrics_of(self, keys, outputs):
        rank = positive_rank(outputs["logits"])
        return {"accuracy": tf.reduce_mean(tf.cast(rank < 1, tf.float32)),
                "accuracy_top5": tf.reduce_mean(tf.cast(rank < 5, tf.float32)),
                "feature_std": feature_std(keys["all"])}

    def chance_loss(self, batch_size):
        return math.log(self.queue.size + 1)

    def _shuffled(self, views):
        """This replica's share of the key images in the order to encode, and where its queries' keys will stand."""
        images = views["key"]
        here = images.shape[0]
        first = first_row(here)
        if self.shuffle_bn == "input":
            return images, views["key_position"]
        if self.shuffle_bn == "none":
            return images, first + tf.range(here)
        everywhere = gather_rows(images)
        batch = everywhere.shape[0]
        permutation = key_permutation(self.seed, self.optimizer.iterations, batch, self.bn_group_size or here)
        return tf.gather(everywhere, permutation[first:][:here]), positions(permutation)[first:][:here]


def feature_std(rows):
    """Mean over the dimensions of the standard deviation of unit rows, times sqrt(C): 1 when they fill the sphere,
    0 when all are alike (collapse)."""
    width = tf.cast(rows.shape[1], rows.dtype)
    return tf.cast(tf.reduce_mean(tf.math.reduce_std(rows, axis=0)) * tf.sqrt(width), tf.float32)
