"""Adaptive pooling against PyTorch, and against cells counted by hand."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.evaluation.pooling import adaptive_pool


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_cells_overlap_where_they_do_not_divide_the_side():
    """Five pixels in three cells: 0 to 2, 1 to 4 and 3 to 5, ends excluded."""
    row = tf.constant([1.0, 2.0, 4.0, 8.0, 16.0])
    square = tf.tile(row[None, None, :, None], [1, 5, 1, 1])
    for reduce, expected in (("avg", [1.5, 14 / 3, 12.0]), ("max", [2.0, 8.0, 16.0])):
        np.testing.assert_allclose(adaptive_pool(square, 3, reduce)[0, :, :, 0], [expected] * 3, rtol=1e-6)
        turned = adaptive_pool(tf.transpose(square, [0, 2, 1, 3]), 3, reduce)[0, :, :, 0]
        np.testing.assert_allclose(turned, np.transpose([expected] * 3), rtol=1e-6)


@pytest.mark.parametrize("reduce", ["max", "avg"])
def test_as_many_cells_as_pixels_change_nothing_and_one_cell_is_global(reduce):
    features = noise(2, 6, 6, 3)
    np.testing.assert_array_equal(adaptive_pool(features, 6, reduce), features)
    whole = features.max((1, 2)) if reduce == "max" else features.mean((1, 2))
    np.testing.assert_allclose(adaptive_pool(features, 1, reduce)[:, 0, 0], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("height, width, cells", [(27, 27, 10), (13, 13, 6), (13, 13, 5), (56, 56, 8), (56, 56, 6),
                                                  (28, 28, 4), (14, 14, 3), (9, 4, 3), (2, 3, 4)])
def test_pytorch_pools_alike(height, width, cells):
    import torch

    features = noise(2, height, width, 5)
    planes = torch.from_numpy(features).permute(0, 3, 1, 2)
    for reduce, pool in (("max", torch.nn.AdaptiveMaxPool2d), ("avg", torch.nn.AdaptiveAvgPool2d)):
        expected = pool(cells)(planes).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(adaptive_pool(features, cells, reduce), expected, rtol=1e-5, atol=1e-6)


def test_xla_and_batches_of_unknown_size():
    features = noise(3, 14, 14, 4)
    pool = tf.function(lambda x: adaptive_pool(x, 3, "avg"), jit_compile=True)
    np.testing.assert_allclose(pool(features), adaptive_pool(features, 3, "avg"), rtol=1e-5, atol=1e-6)
    images = tf.keras.Input((14, 14, 4))
    assert adaptive_pool(images, 3, "max").shape == (None, 3, 3, 4)


def test_what_does_not_exist_is_refused():
    with pytest.raises(UsageError, match="max, avg.*'mean'"):
        adaptive_pool(noise(1, 4, 4, 1), 2, "mean")
    with pytest.raises(UsageError, match="at least 1 cell.*0"):
        adaptive_pool(noise(1, 4, 4, 1), 0, "avg")
