"""Keys that outlive a step: checkpointed variables, equal on every replica."""

import math

import tensorflow as tf

from moco_tf.distribute import (first_row, gather_rows, own_rows, sum_over_replicas, update_copies,
                                variable_per_replica)
from moco_tf.errors import UsageError
from moco_tf.losses import in_batch_logits, info_nce, positive_rank, unit

keras = tf.keras

BLOCK = 4096    # rows of a bank that are drawn at once at its start


class Queue(keras.layers.Layer):
    """The newest `size` keys in a ring, the oldest overwritten first (MoCo v1, sec. 3.2).

    Starts full of random unit rows, as the reference does. Any batch size: `size` need not be a multiple of it.

    Args:
        size: K, the number of keys.
        dim: C, their length.
        branches: V; a row then holds the keys of an image's V branches side by side, (K, V * C).
        seed: of the random rows.

    Raises:
        UsageError: a size below 1.
    """

    def __init__(self, size, dim, branches=1, seed=0, **kwargs):
        super().__init__(**kwargs)
        if size < 1:
            raise UsageError(f"A queue must hold a key at least. Received: queue_size {size}. It takes one global batch or "
                             "more.")
        self.size, self.dim = size, dim

        def unit_rows(shape, dtype=None, **_):
            rows = tf.random.stateless_normal((size * branches, dim), seed=(seed, size), dtype=tf.float64)
            return tf.cast(tf.reshape(unit(rows), shape), dtype)

        state = dict(trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        self.keys = self.add_weight(shape=(size, branches * dim), initializer=unit_rows, name="keys", **state)
        self.pointer = self.add_weight(shape=(), dtype=tf.int64, initializer="zeros", name="pointer", **state)

    def enqueue(self, keys, write=True):
        """Writes `keys`, (B, V * C) unit rows of all replicas, over the oldest B rows; nothing where `write` is False.

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
        update_copies(_write_rows, [self.keys], [(rows, keys)])
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

    Raises:
        UsageError: a momentum outside 0 .. 1.
    """

    def __init__(self, size, dim, momentum=0.5, seed=0, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= momentum <= 1:
            raise UsageError("A memory bank's method.momentum is the share of a row that an update keeps, from 0 to 1. "
                             f"Received: {momentum}. The reference's is 0.5.")
        self.size, self.dim, self.momentum = size, dim, momentum
        self.rows = self._make_rows(seed)

    def _make_rows(self, seed):
        def first_rows(shape, dtype=None, **_):
            return tf.cast(_uniform_rows(seed, 0, *shape), dtype)

        return self.add_weight(shape=(self.size, self.dim), initializer=first_rows, name="rows", trainable=False,
                               aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)

    def read(self, index, alike=False):
        """The rows of `index`, an integer tensor of any shape: (..., C).

        Args:
            alike: the caller vouches that `index` is equal on all replicas. A sharded bank then moves 1 / R as much.

        Raises:
            InvalidArgumentError: an index that the bank has no row for; not under XLA, which cannot raise.
        """
        return self._gather(self._checked(index))

    def full_softmax(self, queries, index, temperature):
        """The softmax over all n rows, of which a query's own image is the right one (arXiv:1805.01978, eq. 2).

        Args:
            queries: (N, C) unit rows, of this replica.
            index: (N,) integers, of their images.
            temperature: > 0, divides the products.

        Returns:
            (N,) losses in nats, with gradients to `queries`; (N,) int32, how many rows score above the right one.

        Raises:
            InvalidArgumentError: as `read` does.
        """
        logits, index = in_batch_logits(queries, tf.convert_to_tensor(self.rows), temperature), self._checked(index)
        return info_nce(logits, index), positive_rank(logits, index)

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
        self._scatter(index, tf.gather(tf.where(write, after, before), _last_equal(index)))

    def _gather(self, index):
        # Of a variable that is mirrored over replicas, tf.gather would first copy all of it.
        return tf.raw_ops.ResourceGather(resource=self.rows.handle, indices=index, dtype=self.rows.dtype)

    def _scatter(self, index, rows):
        update_copies(_write_rows, [self.rows], [(index, rows)])

    def _checked(self, index):
        inside = tf.reduce_all((index >= 0) & (index < self.size))
        told = [f"the memory bank has rows for indexes 0 to {self.size - 1}, of as many training images; received the "
                "indexes", index]
        with tf.control_dependencies([tf.debugging.Assert(inside, told)]):
            return tf.identity(index)


class ShardedMemoryBank(MemoryBank):
    """A `MemoryBank` of which each of R replicas holds ceil(n / R) rows only; 14 million rows need no single device.

    It starts with the same rows, and saves and restores what an unsharded bank does, on any number of replicas. All
    replicas call its methods together. `read` moves and holds R times what one replica asks for, unless all ask alike:
    negatives shared by all queries suit it, negatives of each query's own do not. `full_softmax` moves queries, never
    rows; `update` moves nothing, as the owner of a row writes it.
    """

    def _make_rows(self, seed):
        return Shards(self.size, self.dim, self.dtype, lambda first, count: _uniform_rows(seed, first, count, self.dim))

    def read(self, index, alike=False):
        index = self._checked(index)
        if alike:
            return sum_over_replicas(self._gather(index))
        flat = tf.reshape(index, [-1])
        rows = own_rows(sum_over_replicas(self._gather(gather_rows(flat))), flat.shape[0])
        return tf.reshape(rows, [*index.shape, self.dim])

    def full_softmax(self, queries, index, temperature):
        place = self.rows.place(gather_rows(self._checked(index)))
        return softmax_over_shards(queries, place, self.rows.read(), self.rows.own_count(), temperature)

    def _gather(self, index):
        """The rows of this replica's shard, zeros for all others."""
        return self.rows.gather(self.rows.place(index))

    def _scatter(self, index, rows):
        self.rows.scatter(self.rows.place(index), rows)


class Shards(tf.Module):
    """(n, C) rows dealt to R replicas, ceil(n / R) in succession to each; one more row, always of zeros, stands in each
    shard for the rows of all others.

    A checkpoint has them as one tensor, under the name that a variable of all rows would have.

    Args:
        size, dim: n, C.
        dtype: of the rows.
        first_rows: (first, count) -> (count, C): with what rows first .. first + count - 1 start.
    """

    def __init__(self, size, dim, dtype, first_rows):
        super().__init__()
        self.size, self.dim, self.dtype = size, dim, tf.as_dtype(dtype)
        self.most = -(-size // tf.distribute.get_strategy().num_replicas_in_sync)
        shards = variable_per_replica((self.most + 1, dim), self.dtype, "rows")
        self._shards = lambda: shards    # in a function, or TensorFlow would save the variable on its own, too
        self._assign(first_rows)

    def place(self, index):
        """Where this replica's shard has the rows of `index`: int32 of its shape, `most` for rows of another shard."""
        place = tf.cast(index, tf.int32) - first_row(self.most)
        return tf.where((place >= 0) & (place < self.most), place, self.most)

    def own_count(self):
        """How many rows this replica has: `most`, the last ones fewer, where R does not divide n."""
        return tf.clip_by_value(self.size - first_row(self.most), 0, self.most)

    def read(self):
        """This replica's shard, (most + 1, C)."""
        return tf.raw_ops.ReadVariableOp(resource=self._handle(), dtype=self.dtype)

    def gather(self, place):
        return tf.raw_ops.ResourceGather(resource=self._handle(), indices=place, dtype=self.dtype)

    def scatter(self, place, rows):
        """Writes `rows`, (B, C), to the places that are this replica's."""
        rows = tf.where(place[:, None] < self.most, rows, 0.0)
        tf.raw_ops.ResourceScatterUpdate(resource=self._handle(), indices=place, updates=rows)

    def whole(self):
        """All rows, (n, C), on the host."""
        with tf.device("/CPU:0"):
            return tf.concat([shard[:count] for _, count, shard in self._parts()], axis=0)

    def numpy(self):
        return self.whole().numpy()

    def _handle(self):
        return self._shards()[0].handle

    def _parts(self):
        """(first row, number of rows, variable) of each shard that has any."""
        firsts = range(0, self.size, self.most)
        return [(first, min(self.most, self.size - first), shard) for first, shard in zip(firsts, self._shards()[1])]

    def _assign(self, rows_of):
        """Sets all rows; rows_of(first, count) -> (count, C)."""
        with tf.device("/CPU:0"):
            for first, count, shard in self._parts():
                rows = tf.cast(rows_of(first, count), self.dtype)
                shard.assign(tf.pad(rows, [[0, self.most + 1 - count], [0, 0]]))

    # What TensorFlow asks of a variable that saves itself.

    def _serialize_to_tensors(self):
        return {"VARIABLE_VALUE": self.whole()}

    def _restore_from_tensors(self, tensors):
        whole = tf.ensure_shape(tensors["VARIABLE_VALUE"], (self.size, self.dim))
        self._assign(lambda first, count: whole[first:first + count])


def softmax_over_shards(queries, place, shard, count, temperature):
    """`MemoryBank.full_softmax` where each of R replicas has a shard of the rows, which scores the queries of all.

    Args:
        queries: (N, C) of this replica.
        place: (R * N,) int32: where the shard has the right row of each replica's queries; the last place: nowhere.
        shard: (M + 1, C), the last row zero.
        count: how many of its rows count, from the first.
        temperature: > 0, divides the products.

    Returns:
        As `full_softmax`; `shard` gets no gradient.
    """
    share, last = queries.shape[0], shard.shape[0] - 1

    @tf.custom_gradient
    def scored(queries):
        logits = in_batch_logits(gather_rows(queries), shard, temperature)
        logits = tf.where(tf.range(last + 1) < count, logits, -math.inf)
        total = tf.reduce_logsumexp(gather_rows(tf.reduce_logsumexp(logits, axis=1)[None]), axis=0)
        right = sum_over_replicas(tf.where(place < last, tf.gather(logits, place, axis=1, batch_dims=1), 0.0))
        rank = sum_over_replicas(tf.math.count_nonzero(logits > right[:, None], axis=1, dtype=tf.int32))

        def gradient(upstream, _):
            expected = tf.matmul(tf.exp(logits - total[:, None]), shard)    # this shard's part of the expected row
            of_all = gather_rows(upstream)[:, None] * (expected - tf.gather(shard, place)) / temperature
            return own_rows(sum_over_replicas(of_all), share)

        return (own_rows(total - right, share), own_rows(rank, share)), gradient

    return scored(queries)


def _uniform_rows(seed, first, count, dim):
    """Rows first .. first + count - 1 of those a bank starts with, (count, C) float32: the same however they are split.

    Drawn on the host: a large bank does not fit a device twice.
    """
    bound = math.sqrt(3 / dim)
    with tf.device("/CPU:0"):
        blocks = []
        for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
            begin, end = max(first - block * BLOCK, 0), first + count - block * BLOCK
            blocks.append(tf.random.stateless_uniform((BLOCK, dim), seed=(seed, block), minval=-bound, maxval=bound,
                                                      alg="philox")[begin:end])
        return tf.concat(blocks, axis=0)


def _write_rows(variable, index_and_rows):
    """By the variable's handle: those of TPUStrategy have no scatter_nd_update."""
    index, rows = index_and_rows
    tf.raw_ops.ResourceScatterNdUpdate(ref=variable.handle, indices=index[:, None], updates=rows)


def _last_equal(index):
    """(B,) -> (B,) int32: for each entry, the last position that holds the same value."""
    places = tf.range(index.shape[0])
    return tf.reduce_max(tf.where(index[:, None] == index[None, :], places[None, :], -1), axis=1)
