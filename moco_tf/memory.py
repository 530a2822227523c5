"""Keys that outlive a step: checkpointed variables, equal on every replica."""

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
