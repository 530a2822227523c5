"""Keys that outlive a step: checkpointed variables, equal on every replica."""

import math

import tensorflow as tf

from moco_tf.distribute import update_copies
from moco_tf.losses import unit

keras = tf.keras


class Queue(keras.layers.Layer):
    """The newest `size` keys in a ring, the oldest overwritten first (MoCo v1, sec. 3.2).

    Starts full of random unit rows, as the reference does. Any batch size: `size` need not be a multiple of it.

    Args:
        size: K, the number of keys.
        dim: C, their length.
        seed: of the random rows.
    """

    def __init__(self, size, dim, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.size, self.dim = size, dim

        def unit_rows(shape, dtype=None, **_):
            return tf.cast(unit(tf.random.stateless_normal(shape, seed=(seed, size), dtype=tf.float64)), dtype)

        state = dict(trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        self.keys = self.add_weight(shape=(size, dim), initializer=unit_rows, name="keys", **state)
        self.pointer = self.add_weight(shape=(), dtype=tf.int64, initializer="zeros", name="pointer", **state)

    def enqueue(self, keys, write=True):
        """Writes `keys`, (B, C) unit rows of all replicas, over the oldest B rows; nothing where `write` is False.

        Raises:
            ValueError: while tracing, when B exceeds the size.
        """
        batch = keys.shape[0]
        if batch > self.size:
            raise ValueError(
                "The queue must hold at least one global batch, or a step would overwrite keys it has just written. "
                f"Received: queue size {self.size}, global batch {batch}. Raise method.queue_size or lower batch_size.")
        rows = (self.pointer + tf.range(batch, dtype=tf.int64)) % self.size
        keys = tf.where(write, keys, tf.gather(self.keys, rows))
        update_copies(lambda variable, rows_and_keys: variable.scatter_nd_update(rows_and_keys[0][:, None],
                                                                                 rows_and_keys[1]),
                      [self.keys], [(rows, keys)])
        self.pointer.assign(tf.where(write, (self.pointer + batch) % self.size, self.pointer))


class MemoryBank(keras.layers.Layer):
    """One slowly moving row for each training image, found by its index (instance discrimination, arXiv:1805.01978).

    Rows start uniform on (-a, a) with a = sqrt(3 / C): not of norm 1, but so in the mean square. Every replica holds
    the whole bank.

    Args:
        size: n, the number of training images.
        dim: C, the length of a row.
        momentum: the share of a row that an update keeps.
        seed: of the first rows.
    """

    def __init__(self, size, dim, momentum=0.5, seed=0, **kwargs):
        super().__init__(**kwargs)
        self.size, self.dim, self.momentum = size, dim, momentum
        bound = math.sqrt(3 / dim)

        def uniform_rows(shape, dtype=None, **_):    # drawn in float32: a large bank in float64 would not fit twice
            return tf.cast(tf.random.stateless_uniform(shape, seed=(seed, size), minval=-bound, maxval=bound), dtype)

        self.rows = self.add_weight(shape=(size, dim), initializer=uniform_rows, name="rows", trainable=False,
                                    aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def read(self, index):
        """The rows of `index`, an integer tensor of any shape: (..., C).

        Raises:
            InvalidArgumentError: an index that the bank has no row for; not under XLA, which cannot raise.
        """
        return self._gather(self._checked(index))

    def update(self, index, features, write=True):
        """Row y <- v / |v|, v = momentum * row + (1 - momentum) * feature; nothing where `write` is False.

        Where an image comes more than once in a batch, its last feature counts, on every device.

        Args:
            index: (B,) integers, of all replicas.
            features: (B, C) unit rows, of all replicas in the same order.

        Raises:
            InvalidArgumentError: as `read` does.
        """
        index = self._checked(index)
        before = self._gather(index)
        after = unit(self.momentum * before + (1.0 - self.momentum) * tf.cast(features, before.dtype))
        # Copies of an index all write the same row, so that the order in which a device scatters them is no matter.
        after = tf.gather(tf.where(write, after, before), _last_equal(index))
        update_copies(lambda variable, rows: variable.scatter_nd_update(rows[0][:, None], rows[1]),
                      [self.rows], [(index, after)])

    def _gather(self, index):
        # Of a variable that is mirrored over replicas, tf.gather would first copy all of it.
        return tf.raw_ops.ResourceGather(resource=self.rows.handle, indices=index, dtype=self.rows.dtype)

    def _checked(self, index):
        inside = tf.reduce_all((index >= 0) & (index < self.size))
        told = [f"the memory bank has rows for indexes 0 to {self.size - 1}, of as many training images; received the "
                "indexes", index]
        with tf.control_dependencies([tf.debugging.Assert(inside, told)]):
            return tf.identity(index)


def _last_equal(index):
    """(B,) -> (B,) int32: for each entry, the last position that holds the same value."""
    places = tf.range(index.shape[0])
    return tf.reduce_max(tf.where(index[:, None] == index[None, :], places[None, :], -1), axis=1)
