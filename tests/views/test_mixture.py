"""Mixtures by algebra on images of one value each, draws by their distributions."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.views import mixture, ops


def flat(values, side=16):
    """One image of each value, (N, side, side, 3)."""
    return tf.constant(np.broadcast_to(np.reshape(values, [-1, 1, 1, 1]), [len(values), side, side, 3]), tf.float32)


def seeds(count):
    return tf.stack([tf.range(count), tf.ones([count], tf.int32)], 1)


# --- ratios and boxes ---


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_beta_has_its_distribution_function(alpha):
    """Kolmogorov and Smirnov's distance from the regularised incomplete beta function."""
    count = 200_000
    drawn = np.sort(mixture.beta(ops.uniform(tf.constant([1, 2]), [2, count]), alpha).numpy().astype(np.float64))
    assert 0.0 <= drawn[0] and drawn[-1] <= 1.0
    alpha = tf.constant(alpha, tf.float64)
    differences = np.abs(tf.math.betainc(alpha, alpha, drawn) - (np.arange(count) + 0.5) / count)
    inside = (drawn > 1e-6) & (drawn < 1.0 - 1e-6)      # beyond, float32 has few numbers for what alpha 0.2 draws often
    assert inside.sum() > 0.9 * count
    assert differences[inside].max() < 2.2 / np.sqrt(count)      # p = 1e-4


def test_beta_is_the_same_with_xla():
    numbers = ops.uniform(tf.constant([1, 2]), [2, 1000])
    compiled = tf.function(mixture.beta, jit_compile=True)(numbers, 0.8)
    np.testing.assert_allclose(mixture.beta(numbers, 0.8), compiled, atol=2e-6)


@pytest.mark.parametrize("height, width", [(16, 16), (31, 20)])
def test_a_box_in_the_middle_leaves_the_ratio(height, width):
    for ratio in (0.02, 0.3, 0.5, 0.95, 1.0):
        sides = mixture.cut_sides(tf.constant(ratio), height, width)
        box = mixture.box_round(height // 2, width // 2, sides, height, width)
        left_over = mixture.ratio_of(box, height, width).numpy()
        assert abs(left_over - ratio) <= 1 / height + 1 / width      # the sides are cut to whole pixels
        mask = mixture.inside(box, height, width).numpy()
        np.testing.assert_allclose(1.0 - mask.mean(), left_over, atol=1e-6)


# --- mixtures ---


def test_smoothed_targets():
    targets = mixture.smooth(tf.constant([1, 0]), 4, 0.2).numpy()
    np.testing.assert_allclose(targets, [[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]], atol=1e-7)


@pytest.mark.parametrize("xla", [False, True], ids=["plain", "xla"])
@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_mixed_as_the_images(mixup, cutmix, xla):
    """Image i is i everywhere and of class i: its mean says which share of it is left, and so must its target."""
    images = flat([0.0, 1.0, 2.0, 3.0])
    mixed = tf.function(lambda seed: mixture.mixture(images, tf.range(4), seed, 4, mixup, cutmix, smoothing=0.0),
                        jit_compile=xla)
    ratios, pasted = [], []
    for seed in seeds(300):
        drawn, targets = (x.numpy() for x in mixed(seed))
        np.testing.assert_allclose(drawn.mean((1, 2, 3)), targets @ np.arange(4.0), atol=1e-5)
        np.testing.assert_allclose(targets.sum(1), 1.0, atol=1e-6)
        np.testing.assert_allclose(targets[0, 3], targets[3, 0], atol=1e-7)      # one ratio for the batch
        ratios.append(targets[0, 0])
        pasted.append(set(np.unique(drawn[0])) <= {0.0, 3.0})
    assert 0.0 <= min(ratios) < 0.3 and 0.9 < max(ratios) <= 1.0
    expected = 1.0 if not mixup else 0.5 if cutmix else 0.0
    assert abs(np.mean(pasted) - expected) <= (0.12 if mixup else 0.0)


def test_the_middle_of_a_pasted_box_is_anywhere():
    images, rows = flat([0.0, 1.0], side=8), []
    mixed = tf.function(lambda seed: mixture.mixture(images, tf.range(2), seed, 2, 0.0, 1.0)[0][0, :, :, 0],
                        jit_compile=True)
    share = np.mean([mixed(seed) for seed in seeds(1000)], axis=0)
    assert share.min() > 0.1      # also the corners, because boxes are cut at the edges
    np.testing.assert_allclose(share, share.T, atol=0.1)


def test_both_alphas_zero_only_smooth():
    images = flat([0.0, 1.0, 2.0])      # an odd batch may stay as it is
    same, targets = mixture.mixture(images, tf.range(3), tf.constant([0, 0]), 5, mixup=0.0, cutmix=0.0, smoothing=0.1)
    assert same is images
    np.testing.assert_array_equal(targets, mixture.smooth(tf.range(3), 5, 0.1))


def test_an_odd_batch_is_refused_while_tracing():
    step = tf.function(lambda images: mixture.mixture(images, tf.range(3), tf.constant([0, 0]), 5))
    with pytest.raises(ValueError, match="must be even. Received: 3 images"):
        step.get_concrete_function(tf.TensorSpec([3, 8, 8, 3], tf.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_precisions_keep_their_type(dtype):
    images = tf.cast(flat([0.0, 1.0]), dtype)
    for seed in seeds(8):
        mixed, targets = mixture.mixture(images, tf.range(2), seed, 3, smoothing=0.0)
        assert mixed.dtype == images.dtype and targets.dtype == tf.float32
        np.testing.assert_allclose(tf.reduce_mean(tf.cast(mixed[0], tf.float64)), targets[0, 1], atol=2e-3)
    assert mixture.random_erasing(images, tf.constant([0, 0])).dtype == images.dtype


# --- erasing ---


def test_erasing_fills_one_box_of_some_images_with_noise():
    count, side = 4000, 32
    images = flat(np.full(count, 9.0), side)
    erased = tf.function(mixture.random_erasing, jit_compile=True)(images, tf.constant([3, 4])).numpy()
    changed = np.any(erased != 9.0, axis=3)
    some = changed.any((1, 2))
    assert abs(some.mean() - 0.25) < 0.03
    rows, columns = changed.any(2)[some], changed.any(1)[some]
    heights, widths = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(changed[some].sum((1, 2)), heights * widths)      # a whole rectangle
    for line in (rows, columns):
        assert np.all(np.abs(np.diff(line.astype(int), axis=1)).sum(1) <= 2)        # in one piece
    assert heights.max() < side and widths.max() < side
    area, aspect = heights * widths / side ** 2, widths / heights
    assert 0.01 < area.min() < 0.04 and 0.3 < area.max() < 0.36
    assert 0.2 < aspect.min() < 0.4 and 2.5 < aspect.max() < 4.0
    np.testing.assert_allclose(np.median(aspect), 1.0, atol=0.1)
    noise = erased[changed]
    assert len(np.unique(noise)) > 0.95 * noise.size      # for each pixel and channel
    np.testing.assert_allclose([noise.mean(), noise.std(), np.mean(noise ** 4)], [0.0, 1.0, 3.0], atol=0.03)


def test_erasing_probabilities_and_seeds():
    images = flat(np.full(64, 9.0))
    np.testing.assert_array_equal(mixture.random_erasing(images, tf.constant([0, 0]), probability=0.0), images)
    first, again, other = (mixture.random_erasing(images, tf.constant([0, i]), probability=1.0) for i in (1, 1, 2))
    assert np.all(np.any(first != images, axis=(1, 2, 3)))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_an_image_too_small_for_any_box_stays():
    images = flat([9.0, 9.0], side=1)
    np.testing.assert_array_equal(mixture.random_erasing(images, tf.constant([0, 0]), probability=1.0), images)
