"""The queue against a Python deque, the bank against NumPy, the sharded bank against the whole one."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.distribute import gather_rows
from moco_tf.errors import UsageError
from moco_tf.losses import unit
from moco_tf.memory import BLOCK, MemoryBank, Queue, ShardedMemoryBank


def test_queue_holds_what_a_deque_holds():
    size, dim, batch = 1000, 4, 96
    queue = Queue(size, dim)
    deque = collections.deque(queue.keys.numpy().tolist(), maxlen=size)
    enqueue = tf.function(queue.enqueue)
    for step in range(50):
        keys = np.random.default_rng(step).normal(size=(batch, dim)).astype(np.float32)
        enqueue(tf.constant(keys))
        deque.extend(keys.tolist())
        oldest = int(queue.pointer)
        assert oldest == (step + 1) * batch % size
        np.testing.assert_array_equal(np.roll(queue.keys.numpy(), -oldest, axis=0), np.array(deque, np.float32))


def test_queue_starts_with_random_unit_rows_of_the_seed():
    first, again, other = (Queue(100, 16, seed=seed).keys.numpy() for seed in (0, 0, 1))
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min(axis=1).max() > 0.01
    assert np.abs(first.mean(axis=0)).max() < 0.15    # three standard errors and more of the mean of 100 rows


def test_nothing_is_written_where_write_is_false():
    queue = Queue(10, 4)
    before = queue.keys.numpy()
    queue.enqueue(tf.fill((3, 4), float("nan")), write=tf.constant(False))
    np.testing.assert_array_equal(queue.keys, before)
    assert int(queue.pointer) == 0


def test_a_batch_larger_than_the_queue_is_refused():
    with pytest.raises(ValueError, match="queue size 10, global batch 11"):
        Queue(10, 4).enqueue(tf.zeros((11, 4)))


def test_a_bank_starts_uniform_with_a_mean_square_norm_of_one():
    first, again, other = (MemoryBank(2000, 12, seed=seed).rows.numpy() for seed in (0, 0, 1))
    assert np.abs(first).max() < 0.5 < np.abs(first).max() + 1e-3    # sqrt(3 / 12)
    np.testing.assert_allclose((first ** 2).sum(axis=1).mean(), 1, atol=0.03)    # its standard error is 0.006
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1


@pytest.mark.parametrize("jit", [False, True])
def test_an_updated_row_is_a_mean_of_norm_one_and_no_other_row_changes(jit):
    bank = MemoryBank(20, 4, momentum=0.7)
    before = bank.rows.numpy()
    index, features = np.array([13, 0, 19]), np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    tf.function(bank.update, jit_compile=jit)(tf.constant(index), tf.constant(features))
    expected = before.copy()
    expected[index] = 0.7 * before[index] + 0.3 * features
    expected[index] /= np.linalg.norm(expected[index], axis=1, keepdims=True)
    np.testing.assert_allclose(bank.rows, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(np.delete(bank.rows, index, axis=0), np.delete(before, index, axis=0))
    np.testing.assert_array_equal(bank.read(tf.constant([[13, 1], [0, 13]])), bank.rows.numpy()[[[13, 1], [0, 13]]])


@pytest.mark.parametrize("jit", [False, True])
def test_of_an_image_that_comes_twice_the_last_feature_counts(jit):
    features = unit(tf.constant(np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)))
    bank, once = MemoryBank(10, 4), MemoryBank(10, 4)
    tf.function(bank.update, jit_compile=jit)(tf.constant([3, 7, 3, 7, 3]), features)
    once.update(tf.constant([7, 3]), features[3:])
    np.testing.assert_array_equal(bank.rows, once.rows)


def test_a_bank_keeps_its_rows_where_write_is_false():
    bank = MemoryBank(10, 4)
    before = bank.rows.numpy()
    bank.update(tf.constant([1, 2, 1]), tf.fill((3, 4), float("nan")), write=tf.constant(False))
    np.testing.assert_array_equal(bank.rows, before)


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_without_a_row_is_named(index):
    bank = MemoryBank(10, 4)
    before = bank.rows.numpy()
    for use in (bank.read, lambda index: bank.update(index, tf.ones((2, 4)))):
        for call in (use, tf.function(use)):
            with pytest.raises(tf.errors.InvalidArgumentError, match="rows for indexes 0 to 9"):
                call(tf.constant([2, index], tf.int64))
    np.testing.assert_array_equal(bank.rows, before)


def strategy_of(replicas):
    if replicas == 1:
        return tf.distribute.get_strategy()
    # Without collective kernels, whose keys clash between the strategies of one process.
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)],
                                          cross_device_ops=tf.distribute.ReductionToOneDevice())


def sharded(replicas, size, dim, **options):
    strategy = strategy_of(replicas)
    with strategy.scope():
        return strategy, ShardedMemoryBank(size, dim, **options)


def shards(bank):
    return [shard.numpy() for _, _, shard in bank.rows._parts()]


def run(strategy, function, *values, jit=False):
    """The function's results on every replica, joined; each replica gets its share of the values' rows."""
    share = len(values[0]) // strategy.num_replicas_in_sync
    dealt = [strategy.experimental_distribute_values_from_function(
        lambda context, value=value: tf.constant(value[context.replica_id_in_sync_group * share:][:share]))
        for value in values]
    results = tf.function(lambda *dealt: strategy.run(function, args=dealt), jit_compile=jit)(*dealt)
    return tf.nest.map_structure(lambda result: np.concatenate([*map(np.asarray, strategy.experimental_local_results(
        result))]), results)


@pytest.mark.parametrize("replicas", [1, 2, 4])
@pytest.mark.parametrize("size", [5, 8, 2 * BLOCK + 3])
def test_a_sharded_bank_starts_with_the_rows_of_a_whole_one_and_holds_each_once(replicas, size):
    _, bank = sharded(replicas, size, 3, seed=1)
    np.testing.assert_array_equal(bank.rows.numpy(), MemoryBank(size, 3, seed=1).rows)
    most = -(-size // replicas)
    assert all(len(shard) == most + 1 for shard in shards(bank))
    assert sum(np.any(shard, axis=1).sum() for shard in shards(bank)) == size


@pytest.mark.parametrize("replicas, jit", [(1, False), (1, True), (2, False), (4, False)])
def test_a_sharded_bank_is_read_as_a_whole_one(replicas, jit):
    strategy, bank = sharded(replicas, 9, 3)
    rows, index = bank.rows.numpy(), np.random.default_rng(0).integers(0, 9, (8, 5))
    for own in (index, index[:, 0]):
        np.testing.assert_array_equal(run(strategy, bank.read, own, jit=jit), rows[own])
    alike = run(strategy, lambda _: bank.read(tf.constant(index), alike=True), index, jit=jit)
    np.testing.assert_array_equal(alike, np.concatenate([rows[index]] * replicas))


@pytest.mark.parametrize("replicas, jit", [(1, False), (1, True), (2, False), (4, False)])
def test_a_sharded_bank_is_updated_as_a_whole_one_each_row_by_its_owner(replicas, jit):
    strategy, bank = sharded(replicas, 9, 3, momentum=0.7)
    whole, rng = MemoryBank(9, 3, momentum=0.7), np.random.default_rng(0)

    def update(index, features):
        bank.update(gather_rows(index), gather_rows(features))
        return index

    for _ in range(4):
        index = rng.integers(0, 9, 8)    # most of them with images that come twice, on different replicas
        features = rng.normal(size=(8, 3)).astype(np.float32)
        run(strategy, update, index, features, jit=jit)
        whole.update(tf.constant(index), tf.constant(features))
        np.testing.assert_allclose(bank.rows.numpy(), whole.rows, rtol=0, atol=1e-6 if jit else 0)
    assert not any(np.any(shard[-1]) for shard in shards(bank))    # the row of all others stays zero


def test_a_sharded_bank_keeps_its_rows_where_write_is_false():
    strategy, bank = sharded(2, 9, 3)
    before = shards(bank)

    def update(index):
        bank.update(gather_rows(index), tf.fill((8, 3), float("nan")), write=tf.constant(False))
        return index

    run(strategy, update, np.array([1, 2, 1, 8, 7, 6, 5, 4]))
    np.testing.assert_array_equal(shards(bank), before)


@pytest.mark.parametrize("replicas, jit", [(1, False), (1, True), (2, False), (4, False)])
@pytest.mark.parametrize("size", [5, 23])
def test_the_full_softmax_over_shards_is_that_of_all_rows(replicas, jit, size):
    """Losses, ranks and gradients, where the replicas' losses weigh differently, against NumPy; 1e-12 in float64."""
    strategy, bank = sharded(replicas, size, 6, dtype="float64")
    rng, rows = np.random.default_rng(0), bank.rows.numpy()
    index, weights = rng.integers(0, size, 8), rng.normal(size=8)
    queries = unit(rng.normal(size=(8, 6))).numpy()

    def scored(queries, index, weights):
        with tf.GradientTape() as tape:
            tape.watch(queries)
            losses, ranks = bank.full_softmax(queries, index, 0.05)
            loss = tf.reduce_sum(weights * losses)
        return losses, ranks, tape.gradient(loss, queries)

    losses, ranks, gradients = run(strategy, scored, queries, index, weights, jit=jit)
    logits = queries @ rows.T / 0.05
    right = logits[np.arange(8), index]
    exponentials = np.exp(logits - right[:, None])
    total = exponentials.sum(axis=1)
    np.testing.assert_allclose(losses, np.log(total), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(ranks, (logits > right[:, None]).sum(axis=1))
    towards = (exponentials / total[:, None]) @ rows - rows[index]
    np.testing.assert_allclose(gradients, weights[:, None] * towards / 0.05, rtol=1e-12, atol=1e-12)


def test_a_whole_bank_has_the_same_full_softmax():
    whole, bank = MemoryBank(23, 6), ShardedMemoryBank(23, 6)
    queries, index = unit(np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)), tf.range(8) * 3 % 23
    for one, other in zip(whole.full_softmax(queries, index, 0.1), bank.full_softmax(queries, index, 0.1)):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("saved", ["whole", 1, 2, 4])
def test_a_bank_is_restored_bit_for_bit_whole_or_on_any_number_of_replicas(saved, tmp_path):
    def bank_of(kind, seed):
        return MemoryBank(9, 3, seed=seed) if kind == "whole" else sharded(kind, 9, 3, seed=seed)[1]

    bank = bank_of(saved, seed=1)
    path = tf.train.Checkpoint(bank=bank).write(str(tmp_path / "saved"))
    for kind in ("whole", 1, 2, 4):
        other = bank_of(kind, seed=2)
        assert not np.array_equal(other.rows.numpy(), bank.rows.numpy())
        tf.train.Checkpoint(bank=other).read(path).assert_consumed().assert_existing_objects_matched()
        np.testing.assert_array_equal(other.rows.numpy(), bank.rows.numpy())
    np.testing.assert_array_equal(tf.train.load_checkpoint(path).get_tensor("bank/rows/.ATTRIBUTES/VARIABLE_VALUE"),
                                  bank.rows.numpy())


def test_a_sharded_bank_of_another_size_is_not_restored(tmp_path):
    path = tf.train.Checkpoint(bank=ShardedMemoryBank(9, 3)).write(str(tmp_path / "saved"))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"\[9,3\] is not compatible with expected shape \[10,3\]"):
        tf.train.Checkpoint(bank=ShardedMemoryBank(10, 3)).read(path)


def test_an_index_without_a_row_in_any_shard_is_named():
    strategy, bank = sharded(2, 9, 3)
    with pytest.raises(tf.errors.InvalidArgumentError, match="rows for indexes 0 to 8"):
        run(strategy, bank.read, np.array([1, 9]))


def test_a_bank_sharded_over_several_processes_is_refused(monkeypatch):
    class OfTwoProcesses:
        num_replicas_in_sync = 4

        def experimental_local_results(self, value):
            return value, value

    monkeypatch.setattr(tf.distribute, "get_strategy", OfTwoProcesses)
    with pytest.raises(UsageError, match="Received: 2 of 4 replicas here. Use the strategy default, mirrored or tpu"):
        ShardedMemoryBank(9, 3)
