"""The queue against a Python deque."""

import collections

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.memory import Queue


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
