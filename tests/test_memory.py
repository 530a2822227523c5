"""The queue against a Python deque, the bank against NumPy."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.losses import unit
from moco_tf.memory import MemoryBank, Queue


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
