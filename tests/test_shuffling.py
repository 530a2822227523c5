"""Shuffling BN: what the permutation is for, and that it can be undone."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.shuffling import key_permutation, positions


def groups(order, group):
    return [frozenset(part) for part in np.asarray(order).reshape(-1, group).tolist()]


@pytest.mark.parametrize("batch, group", [(4, 2), (8, 2), (8, 4), (12, 3), (256, 32)])
def test_no_group_of_keys_is_a_group_of_queries(batch, group):
    queries = set(groups(np.arange(batch), group))
    for step in range(60):
        order = key_permutation(0, step, batch, group).numpy()
        assert sorted(order) == list(range(batch))
        assert not queries & set(groups(order, group))


def test_positions_undo_the_permutation():
    order = key_permutation(3, 5, 32, 8)
    keys = tf.gather(tf.range(32) * 10, order)
    np.testing.assert_array_equal(tf.gather(keys, positions(order)), np.arange(32) * 10)


def test_the_draw_is_a_function_of_seed_and_step_and_differs_between_them():
    draw = tf.function(lambda step: key_permutation(1, step, 16, 4))
    np.testing.assert_array_equal(draw(tf.constant(7, tf.int64)), key_permutation(1, 7, 16, 4))
    orders = [tuple(key_permutation(seed, step, 16, 4).numpy()) for seed in range(3) for step in range(10)]
    assert len(set(orders)) == 30


def test_every_place_is_equally_likely():
    orders = np.stack([key_permutation(0, step, 8, 4).numpy() for step in range(2000)])
    counts = np.stack([np.bincount(orders[:, place], minlength=8) for place in range(8)])
    assert np.abs(counts / 2000 - 1 / 8).max() < 4 * np.sqrt(1 / 8 * 7 / 8 / 2000)    # four standard errors


def test_one_group_has_nothing_to_separate():
    assert sorted(key_permutation(0, 0, 8, 8).numpy()) == list(range(8))
