"""Losses: answers from algebra and from NumPy."""

import math

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.losses import (bank_logits, contrastive_logits, estimated_partition, followed_partition, in_batch_logits,
                            info_nce, nce, positive_rank, random_partition, unit)


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


def test_bank_logits_are_of_each_querys_own_rows():
    query, bank = rows(0, 3), rows(1, 15).reshape(3, 5, 8)
    logits = bank_logits(query, bank, temperature=0.1)
    expected = [[q @ row / 0.1 for row in own] for q, own in zip(query, bank)]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, negatives", [(50, 16), (1281167, 4096)])
def test_nce_equals_its_formula_in_numpy(size, negatives):
    logits = np.random.default_rng(0).normal(scale=3, size=(4, 1 + negatives))
    partition = size * np.exp(logits).mean()
    p, noise, epsilon = np.exp(logits) / partition, negatives / size, 1e-7
    expected = -np.log(p[:, 0] / (p[:, 0] + noise + epsilon)) - np.log(noise / (p[:, 1:] + noise + epsilon)).sum(axis=1)
    np.testing.assert_allclose(estimated_partition(logits, size), partition, rtol=1e-12)
    np.testing.assert_allclose(nce(tf.constant(logits), partition, size), expected, rtol=1e-12)
    single = nce(tf.constant(logits, tf.float32), tf.constant(partition, tf.float32), size)
    np.testing.assert_allclose(single, expected, rtol=1e-5)


def test_nce_of_rows_as_likely_as_noise_and_of_huge_logits():
    alike = nce(tf.fill((2, 1001), 7.0), partition=50 * math.exp(7), size=50)
    np.testing.assert_allclose(alike, [math.log(1001) + 1000 * math.log(1.001)] * 2, rtol=1e-5)
    far = nce(tf.constant([[-300.0, 200.0]]), partition=2.0, size=2)    # log Z = log n: P are exp(logit) / 2, K/n = 1/2
    np.testing.assert_allclose(far, [500.0], rtol=1e-6)


def test_no_gradient_flows_through_z():
    logits = tf.Variable([[1.0, 2.0, 3.0]])
    with tf.GradientTape() as tape:
        estimate = estimated_partition(logits, 10)
    assert tape.gradient(estimate, logits) is None


@pytest.mark.parametrize("momentum, expected", [(1.0, 5.0), (0.99, 0.99 * 5.0 + 0.01 * 7.0)])
def test_z_is_the_first_estimate_and_then_follows(momentum, expected):
    first = followed_partition(tf.constant(-1.0), tf.constant(5.0), momentum)
    np.testing.assert_allclose(first, 5.0)
    np.testing.assert_allclose(followed_partition(first, tf.constant(7.0), momentum), expected, rtol=1e-6)


@pytest.mark.parametrize("temperature, relative", [(0.07, 2.22), (0.1, 1.48)])
def test_z_of_a_random_bank(temperature, relative):
    assert random_partition(1000, 128, temperature) == pytest.approx(1000 * relative, rel=3e-3)
