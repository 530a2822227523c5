"""What methods with an encoder for keys share: keys are encoded in another order than queries (MoCo v1, sec. 3.3)."""

import tensorflow as tf

from moco_tf.distribute import first_row, gather_rows, own_rows
from moco_tf.methods.base import Method, unit_branches
from moco_tf.shuffling import key_permutation, positions


class TwoEncoders(Method):
    """Views: "query" and "key", (N, S, S, channels) each; with `shuffle_bn="input"` also "key_position", (N,) int32: the
    pipeline has permuted the keys before it dealt them to the replicas, and says where in that order each query's key
    stands.

    Args:
        encoder: of queries, images -> (N, V * dim) embeddings, not normalised, of V branches.
        key_encoder: the same, of keys.
        dim: C, the length of an embedding.
        shuffle_bn: "input"; "cross_replica": the step itself permutes the key images over the replicas; "none".
        bn_group_size: images that share batch statistics, for "cross_replica".
        seed: of the permutations.
    """

    view_names = ("query", "key")

    def __init__(self, encoder, key_encoder, dim, shuffle_bn="input", bn_group_size=0, seed=0, **kwargs):
        super().__init__(encoder, **kwargs)
        self.key_encoder, self.dim = key_encoder, dim
        self.shuffle_bn, self.bn_group_size, self.seed = shuffle_bn, bn_group_size, seed

    def encode_queries(self, views):
        return [self.unit_rows(self.encoder(views[name], training=True)) for name in self.query_names]

    def keys_of(self, views, name):
        """The keys of a view, of all replicas, in the order of the queries: (B, V * C), each branch's a unit row."""
        images, position = self._shuffled(views, name)
        encoded = gather_rows(self.unit_rows(self.key_encoder(images, training=True)))    # as shuffled
        return tf.gather(encoded, gather_rows(position))

    def unit_rows(self, embeddings):
        return tf.concat(unit_branches(embeddings, self.dim), axis=1)

    def branches_of(self, rows):
        """(N, V * C) -> V tensors (N, C)."""
        return tf.split(rows, rows.shape[1] // self.dim, axis=1)

    def _shuffled(self, views, name):
        """This replica's share of the key images in the order to encode, and where its queries' keys will stand."""
        images = views[name]
        here = images.shape[0]
        if self.shuffle_bn == "input":
            return images, views["key_position"]
        if self.shuffle_bn == "none":
            return images, first_row(here) + tf.range(here)
        everywhere = gather_rows(images)
        batch = everywhere.shape[0]
        seed = self.seed + (name != "key")    # each view has an order of its own
        permutation = key_permutation(seed, self.optimizer.iterations, batch, self.bn_group_size or here)
        return tf.gather(everywhere, own_rows(permutation, here)), own_rows(positions(permutation), here)
