"""Colour spaces against published values, definitions written anew in NumPy, and algebra. Photos: tests/golden."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.views import colour


def cube(step=15):
    """(n, n^2, 3) uint8: a grid over all colours, their extremes included."""
    levels = np.arange(0, 256, step, np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(len(levels), -1, 3)


def of(space, *rgb):
    return colour.convert(np.array(rgb, np.uint8), space, dtype=tf.float64).numpy()


# Computed with scikit-image, to four digits.
@pytest.mark.parametrize("space, rgb, expected", [
    ("Lab", (255, 0, 0), (53.2406, 80.0923, 67.2028)), ("Lab", (0, 255, 0), (87.7351, -86.1830, 83.1797)),
    ("Lab", (0, 0, 255), (32.2957, 79.1856, -107.8573)), ("Lab", (10, 20, 30), (5.9485, -0.6693, -8.1364)),
    ("YCbCr", (255, 0, 0), (81.481, 90.203, 240.0)), ("YCbCr", (10, 20, 30), (31.5876, 133.8744, 122.8936))])
def test_published_values(space, rgb, expected):
    np.testing.assert_allclose(of(space, *rgb), expected, atol=5e-5)
    np.testing.assert_allclose(colour.convert(np.array(rgb, np.uint8), space), expected, atol=1e-4)


def test_lab_and_luv_are_their_definitions():
    """CIE 15: powers and cube roots as NumPy has them, from XYZ by sRGB's own curve."""
    c = cube() / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169],
                             [0.019334, 0.119193, 0.950227]]).T
    white = np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz / white > 0.008856, np.cbrt(xyz / white), 7.787 * xyz / white + 16 / 116)
    lab = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1)

    def chromaticity(v):
        total = v @ [1.0, 15.0, 3.0]
        total = np.where(total > 0, total, 1.0)
        return np.stack([4 * v[..., 0] / total, 9 * v[..., 1] / total], -1)

    y = xyz[..., 1]
    lightness = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)[..., None]
    luv = np.concatenate([lightness, 13 * lightness * (chromaticity(xyz) - chromaticity(white))], -1)
    for space, expected in (("XYZ", xyz), ("Lab", lab), ("LUV", luv)):
        np.testing.assert_allclose(colour.convert(cube(), space, -1, tf.float64), expected, atol=1e-10, err_msg=space)


def test_hue_saturation_and_value():
    for turn, rgb in enumerate([(255, 0, 0), (255, 255, 0), (0, 255, 0), (0, 255, 255), (0, 0, 255), (255, 0, 255)]):
        np.testing.assert_allclose(of("HSV", *rgb), [turn / 6, 1, 1])
    np.testing.assert_allclose(of("HSV", 51, 51, 51), [0, 0, 0.2])
    np.testing.assert_allclose(of("HSV", 255, 204, 204), [0, 0.2, 1])
    np.testing.assert_allclose(of("HSV", 0, 0, 0), [0, 0, 0])


def test_stains_are_separated():
    """Light that a single stain has absorbed is of that stain alone."""
    absorbs = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    for stain in range(3):
        transmitted = tf.constant(np.exp(0.2 * np.log(1e-6) * absorbs[stain]), tf.float64)
        np.testing.assert_allclose(colour.hed(*tf.unstack(transmitted)), 0.2 * np.eye(3)[stain], atol=1e-12)
    np.testing.assert_allclose(of("HED", 255, 255, 255), [0, 0, 0])


def test_ycbcr_has_a_limited_range():
    np.testing.assert_allclose(of("YCbCr", 0, 0, 0), [16, 128, 128])
    np.testing.assert_allclose(of("YCbCr", 255, 255, 255), [235, 128, 128])


@pytest.mark.parametrize("space", ["YUV", "YPbPr", "YIQ", "YDbDr", "YCbCr", "Lab", "LUV"])
def test_grey_has_no_chroma(space):
    """As far as the published digits of matrices and white go: a thousandth of a channel's range."""
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    chroma = colour.convert(grey, space, -1, tf.float64)[:, 1:] - of(space, 0, 0, 0)[1:]
    assert (np.abs(chroma) <= 1e-3 * np.array(colour.SPACES[space].half_range[1:])).all()


def test_cie_rgb_is_the_way_back_from_xyz():
    """The CIE's primaries make of it what sRGB's make of the same numbers."""
    primaries = np.array([[0.49, 0.31, 0.20], [0.17697, 0.81240, 0.01063], [0.00, 0.01, 0.99]]) / 0.17697
    srgb = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    np.testing.assert_allclose(colour.convert(cube(), "CIERGB", -1, tf.float64) @ primaries.T, cube() / 255.0 @ srgb.T,
                               atol=1e-12)


@pytest.mark.parametrize("space", colour.SPACES)
def test_normalized_channels_fill_minus_one_to_one(space):
    values = colour.normalized(cube(3), space, -1, tf.float64).numpy()
    low, high = values.min((0, 1)), values.max((0, 1))
    expected_low, expected_high = (-1, -1, -1), (1, 1, 1)
    if space == "YCbCr":    # CMC's own constants, not the middle
        expected_low, expected_high = (-0.915, -0.939, -1.039), (1.085, 1.063, 0.962)
    np.testing.assert_allclose(low, expected_low, atol=6e-3)
    np.testing.assert_allclose(high, expected_high, atol=6e-3)
    middle, half = (np.array(constant) for constant in colour.SPACES[space][1:])
    np.testing.assert_allclose(values * half + middle, colour.convert(cube(3), space, -1, tf.float64), atol=1e-10)


@pytest.mark.parametrize("space", colour.SPACES)
def test_planes_images_batches_xla_and_precisions_agree(space):
    batch = np.random.default_rng(0).integers(0, 256, (2, 12, 10, 3), np.uint8)
    exact = colour.convert(batch, space, -1, tf.float64).numpy()
    bound = 2e-6 * np.array(colour.SPACES[space].half_range)
    for xla in (False, True):
        images = tf.function(lambda x: colour.convert(x, space, -1), jit_compile=xla)
        planes = tf.function(lambda x: colour.convert(x, space), jit_compile=xla)
        for found in (images(batch), tf.stack([images(image) for image in batch]),
                      tf.stack([tf.transpose(planes(np.transpose(image, [2, 0, 1])), [1, 2, 0]) for image in batch])):
            assert found.dtype == tf.float32 and found.shape == batch.shape
            assert (np.abs(found - exact) <= bound).all()


def test_inside_a_data_set_with_images_of_any_size():
    images = tf.data.Dataset.from_generator(
        lambda: (np.full((side, side, 3), 255, np.uint8) for side in (2, 5)),
        output_signature=tf.TensorSpec([None, None, 3], tf.uint8))
    whites = list(images.map(lambda image: colour.normalized(image, "Lab", -1)).as_numpy_iterator())
    assert [white.shape for white in whites] == [(2, 2, 3), (5, 5, 3)]
    np.testing.assert_allclose(whites[1][..., 0], 1.0, atol=1e-6)


@pytest.mark.parametrize("function", [colour.convert, colour.normalized])
def test_what_does_not_exist_is_refused(function):
    with pytest.raises(UsageError, match="Lab, YCbCr.*'lab'"):
        function(cube(51), "lab", -1)
