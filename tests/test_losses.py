"""Losses: answers from algebra and from NumPy."""

import math

import numpy as np
import tensorflow as tf

from moco_tf.losses import contrastive_logits, in_batch_logits, info_nce, positive_rank, unit


def rows(seed, count, width=8):
    values = np.random.default_rng(seed).normal(size=(count, width))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def test_info_nce_of_equal_keys_is_log_of_their_number():
    row = unit(tf.ones((1, 8)))
    logits = contrastive_logits(row, row, tf.repeat(row, 15, axis=0), temperature=0.07)
    np.testing.assert_allclose(info_nce(logits), [math.log(16)], rtol=1e-6)


def test_info_nce_equals_numpy():
    query, positive, negatives = rows(0, 5), rows(1, 5), rows(2, 30)
    logits = np.concatenate([np.sum(query * positive, axis=1, keepdims=True), query @ negatives.T], axis=1) / 0.2
    expected = -logits[:, 0] + np.log(np.exp(logits).sum(axis=1))
    ours = contrastive_logits(query, positive, negatives, 0.2)
    np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(info_nce(ours), expected, rtol=1e-5)


def test_positive_rank_counts_better_negatives():
    logits = tf.constant([[3., 1., 2.], [1., 2., 3.], [2., 1., 3.], [1., 1., 1.]])
    np.testing.assert_array_equal(positive_rank(logits), [0, 2, 1, 0])


def test_unit_floors_the_norm_and_leaves_half_precision():
    assert unit(tf.zeros((2, 4))).numpy().sum() == 0
    tiny = unit(tf.constant([[3e-9, 4e-9]], tf.float64))
    np.testing.assert_allclose(tiny, [[0.6, 0.8]])    # Keras' floor of 1e-6 on the norm would shrink this row
    assert unit(tf.ones((1, 4), tf.bfloat16)).dtype == tf.float32
    assert unit(tf.ones((1, 4), tf.float64)).dtype == tf.float64


def test_in_batch_logits_with_the_positives_on_a_diagonal():
    query, keys = rows(0, 4), rows(1, 12)
    logits = in_batch_logits(query, keys, temperature=0.5)
    np.testing.assert_allclose(logits, query @ keys.T / 0.5, rtol=1e-5, atol=1e-6)
    positive = np.arange(4, 8)    # of the second of three replicas
    values = logits.numpy().astype(np.float64)
    expected = np.log(np.exp(values).sum(axis=1)) - values[np.arange(4), positive]
    np.testing.assert_allclose(info_nce(logits, positive), expected, rtol=1e-5)
    better = [(row > row[column]).sum() for row, column in zip(values, positive)]
    np.testing.assert_array_equal(positive_rank(logits, positive), better)
