"""Primitives against definitions written anew in NumPy, algebra, and counts of what is random."""

import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.errors import UsageError
from moco_tf.views import ops


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def planes(height=24, width=20):
    return ops.to_planes(tf.constant(noise(height, width, 3)))


def over_seeds(stage, image, count):
    """A stage's views of an image for `count` seeds."""
    @tf.function(jit_compile=True)
    def all_of(seeds):
        return tf.map_fn(lambda seed: stage(image, ops.uniform(seed, [stage.count])), seeds, fn_output_signature=image.dtype)
    return all_of(tf.stack([tf.range(count), tf.ones([count], tf.int32)], 1)).numpy()


def assert_share(hits, expected, slack):
    """A share of coin flips, within five standard deviations and `slack`."""
    assert abs(np.mean(hits) - expected) <= 5 * math.sqrt(expected * (1 - expected) / len(hits)) + slack


# --- randomness ---


def test_uniform_is_uniform_and_the_same_with_xla():
    seed = tf.constant([1, 2])
    numbers = ops.uniform(seed, [100_000])
    compiled = tf.function(lambda s: ops.uniform(s, [100_000]), jit_compile=True)(seed)
    np.testing.assert_array_equal(numbers, compiled)
    assert 0.0 <= tf.reduce_min(numbers) and tf.reduce_max(numbers) < 1.0
    np.testing.assert_allclose(np.histogram(numbers, 10, (0, 1))[0], 10_000, atol=500)
    assert np.any(numbers != ops.uniform(tf.constant([1, 3]), [100_000]))


def test_normal_is_normal():
    numbers = ops.normal(tf.constant([1, 2]), [2, 100_000]).numpy()
    np.testing.assert_allclose(numbers.mean(1), 0.0, atol=0.015)
    np.testing.assert_allclose(np.quantile(numbers, [0.00135, 0.15866, 0.5, 0.84134, 0.99865]), [-3, -1, 0, 1, 3],
                               atol=0.06)
    np.testing.assert_allclose(np.corrcoef(numbers)[0, 1], 0.0, atol=0.015)
    compiled = tf.function(lambda s: ops.normal(s, [2, 100_000]), jit_compile=True)(tf.constant([1, 2]))
    np.testing.assert_allclose(numbers, compiled, atol=1e-5)
    assert np.all(np.isfinite(compiled))


@pytest.mark.parametrize("make, change", [
    (ops.random_grayscale, ops.grayscale), (ops.random_flip, ops.flip), (ops.random_solarize, ops.solarize),
    (lambda p: ops.random_blur((0.7, 0.7), p), lambda x: ops.blur(x, tf.constant(0.7))),
    (lambda p: ops.random_jitter(brightness=0.9, probability=p), None)])
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.8, 1.0])
def test_stage_applies_as_often_as_asked(make, change, probability):
    image = planes(4, 4)
    drawn = over_seeds(make(probability), image, 1500)
    untouched = np.all(drawn == image.numpy(), axis=(1, 2, 3))
    if change is not None:
        assert np.all(untouched | np.all(drawn == change(image).numpy(), axis=(1, 2, 3)))
    assert_share(~untouched, probability, slack=0.0 if change else 0.01)     # a factor close to 1 changes nothing


def test_jitter_orders_are_equally_frequent(monkeypatch):
    monkeypatch.setattr(ops, "jitter", lambda planes, names, factors, order: order)
    orders = over_seeds(ops.random_jitter(0.4, 0.4, 0.4, 0.1), tf.zeros([4], tf.int32), 24_000)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert np.sum((counts - 1000) ** 2 / 1000) < 60      # chi-squared, 23 degrees of freedom: p = 4e-5


def test_jitter_factors_fill_their_ranges(monkeypatch):
    monkeypatch.setattr(ops, "jitter", lambda planes, names, factors, order: factors)
    factors = over_seeds(ops.random_jitter(0.4, 1.5, 0.2, 0.1), tf.zeros([4]), 20_000)
    np.testing.assert_allclose(factors.min(0), [0.6, 0.0, 0.8, -0.1], atol=1e-3)
    np.testing.assert_allclose(factors.max(0), [1.4, 2.5, 1.2, 0.1], atol=1e-3)
    np.testing.assert_allclose(factors.mean(0), [1.0, 1.25, 1.0, 0.0], atol=0.02)


def test_strength_zero_adds_no_adjustment():
    image = planes()
    nothing, contrast = ops.random_jitter(), ops.random_jitter(contrast=0.4)
    np.testing.assert_array_equal(nothing(image, tf.zeros([1])), image)
    only_contrast = contrast(image, ops.uniform(tf.constant([0, 0]), [contrast.count]))
    assert abs(float(tf.reduce_mean(ops.grey(only_contrast)) - tf.reduce_mean(ops.grey(image)))) < 2


# --- geometry ---


def torchvision_box(numbers, height, width, scale, ratio):
    """RandomResizedCrop.get_params in plain Python, from given uniform numbers."""
    for attempt in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[2 * attempt])
        aspect = math.exp(math.log(ratio[0]) + math.log(ratio[1] / ratio[0]) * numbers[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(numbers[20] * (height - h + 1)), int(numbers[21] * (width - w + 1)), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("height, width", [(375, 500), (28, 28), (600, 40), (17, 1000), (1, 1)])
def test_crop_box_follows_torchvision(height, width):
    scale, ratio = (0.2, 1.0), (3 / 4, 4 / 3)
    numbers = ops.uniform(tf.constant([height, width]), [500, 22])
    boxes = np.stack(ops.crop_box(numbers, tf.constant(height), tf.constant(width), scale, ratio), 1)
    expected = [torchvision_box(n, height, width, scale, ratio) for n in numbers.numpy().astype(np.float64)]
    # float32 against float64: a box may round to the other side of a half.
    assert np.mean(np.any(boxes != expected, axis=1)) <= 0.004
    top, left, h, w = boxes.T
    assert np.all((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width))


def frames_of(*boxes):
    """Of boxes (top, left, height, width), resized to 64 x 64."""
    low, length = tf.unstack(tf.reshape(tf.constant(boxes), [-1, 2, 2]), axis=1)
    return ops.Frame(low, length, tf.zeros(length.shape), tf.cast(length, tf.float32) / 64)


def one_of(frames, which=0):
    return ops.Frame(*(part[which] for part in frames))


def test_both_resamplers_equal_tensorflows_antialiased_resize():
    """Of several parts at once."""
    boxes = [(0, 0, 300, 401), (10, 20, 60, 70), (120, 200, 9, 150), (299, 400, 1, 1)]
    image, frames = tf.constant(noise(300, 401, 3)), frames_of(*boxes)
    for i, (top, left, height, width) in enumerate(boxes):
        expected = tf.image.resize(image[top:top + height, left:left + width], (64, 64), antialias=True)
        for columns in (ops.resample(image, frames, 64)[i], ops.resample(image, frames_of(boxes[i]), 64)[0]):
            np.testing.assert_allclose(tf.transpose(columns, [2, 0, 1]), expected, atol=1e-3)
        levels = ops.to_levels(ops.resample(image, frames, 64)[i], "bilinear")
        np.testing.assert_array_equal(tf.cast(levels, tf.float32), ops.nearest(columns))
        planes = ops.resample_planes(image, one_of(frames, i), 64)
        np.testing.assert_allclose(tf.transpose(planes, [1, 2, 0]), expected, atol=1e-3)


@pytest.mark.parametrize("box", [(0, 0, 80, 90), (10, 20, 60, 47), (12, 20, 9, 50)])
def test_both_bicubic_resamplers_equal_pillow(box):
    top, left, height, width = box
    image = noise(80, 90, 3)      # overshoots everywhere
    frames = frames_of(box)
    expected = np.asarray(Image.fromarray(image[top:top + height, left:left + width]).resize(
        (64, 64), Image.Resampling.BICUBIC))
    for columns in (ops.resample(tf.constant(image), frames, 64, "bicubic")[0],
                    tf.transpose(ops.resample_planes(tf.constant(image), one_of(frames), 64, "bicubic"), [2, 0, 1])):
        levels = tf.transpose(ops.to_levels(columns, "bicubic"), [2, 0, 1])
        differences = np.abs(levels.numpy().astype(int) - expected)
        assert differences.max() <= 1 and np.mean(differences > 0) < 0.005


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (256, 256), (60, 47)])
def test_central_crop_equals_resizing_the_whole_image_first(height, width):
    size, shorter = 224, 256
    image = tf.constant(noise(height, width, 3))
    whole = [int(shorter * n / min(height, width)) for n in (height, width)]
    top, left = (round((n - size) / 2) for n in whole)
    expected = tf.image.resize(image, whole, antialias=True)[top:top + size, left:left + size]
    frames = ops.central_crop(size, shorter).frame(tf.constant([height, width]), tf.zeros([1, 1]))
    np.testing.assert_allclose(tf.transpose(ops.resample(image, frames, size)[0], [2, 0, 1]), expected, atol=2e-2)


# --- colour ---


def test_neutral_and_extreme_factors():
    image, one, zero = planes(), tf.constant(1.0), tf.constant(0.0)
    for operation in (ops.brightness, ops.contrast, ops.saturation):
        np.testing.assert_array_equal(operation(image, one), image)
    np.testing.assert_array_equal(ops.brightness(image, zero), tf.zeros_like(image))
    np.testing.assert_array_equal(ops.saturation(image, zero), ops.grayscale(image))
    assert len(np.unique(ops.contrast(image, zero))) == 1
    np.testing.assert_allclose(ops.hue(image, zero, levels=False), image, atol=1e-3)


def test_a_third_of_a_turn_moves_red_to_green_to_blue():
    image = planes()
    np.testing.assert_allclose(ops.hue(image, tf.constant(1 / 3), levels=False), tf.roll(image, 1, 0), atol=1e-2)


def test_grey_is_pillows_integer_luma():
    red, green, blue = planes().numpy().astype(np.int64)
    np.testing.assert_array_equal(ops.grey(planes()), (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16)


def pillow_blur(image, sigma):
    """Pillow's extended box blur in its own integers, (H, W) uint8 values."""
    variance = sigma * sigma / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    full = int((1 << 24) / (2 * (whole + part) + 1))
    rest = ((1 << 24) - (2 * whole + 1) * full) // 2
    for axis in (1, 0):
        for _ in range(3):
            padding = [(0, 0), (0, 0)]
            padding[axis] = (whole + 1, whole + 1)
            padded = np.pad(image.astype(np.int64), padding, mode="edge")
            taps = [np.take(padded, range(i, i + image.shape[axis]), axis) for i in range(2 * whole + 3)]
            image = (full * sum(taps[1:-1]) + rest * (taps[0] + taps[-1]) + (1 << 23)) >> 24
    return image


@pytest.mark.parametrize("sigma", [0.1, 0.37, 0.93, 1.3, 1.41, 1.42, 1.95, 2.43])
def test_blur_equals_pillows_integers(sigma):
    image = noise(30, 41, 3)
    expected = np.stack([pillow_blur(image[:, :, c], sigma) for c in range(3)])
    blurred = ops.blur(ops.to_planes(tf.constant(image)), tf.constant(sigma)).numpy()
    assert np.abs(blurred - expected).max() <= 1
    assert np.mean(blurred != expected) < 0.01


def test_blur_has_the_variance_of_its_gaussian():
    impulse = np.zeros((3, 41, 41), np.float32)
    impulse[:, 20, 20] = 1.0
    for sigma in (0.3, 1.0, 1.9):
        response = ops.blur(tf.constant(impulse), tf.constant(sigma), levels=False).numpy()[0]
        np.testing.assert_allclose(response.sum(), 1.0, atol=1e-5)
        for axis in (0, 1):
            np.testing.assert_allclose(response.sum(axis) @ (np.arange(41) - 20.0) ** 2, sigma ** 2, rtol=1e-3)


def test_solarize_and_flip():
    image = planes()
    np.testing.assert_array_equal(ops.flip(ops.flip(image)), image)
    np.testing.assert_array_equal(ops.flip(image), image.numpy()[:, :, ::-1])
    np.testing.assert_array_equal(ops.solarize(image), np.where(image < 128, image, 255 - image))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UsageError, match="sigma"):
        ops.random_blur((0.1, 2.5), 0.5)
    for scale in ((0.0, 1.0), (0.5, 0.2), (0.2, 1.5)):
        with pytest.raises(UsageError, match="crop"):
            ops.random_crop(32, scale)


# --- normalisation ---


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-6), ("bfloat16", 1e-2)])
def test_normalize(dtype, tolerance):
    images, mean, std = noise(4, 6, 5, 3), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    normalized = ops.normalize(tf.constant(images), mean, std, dtype)
    assert normalized.dtype == tf.as_dtype(dtype) and normalized.shape == images.shape
    np.testing.assert_allclose(tf.cast(normalized, tf.float64), (images / 255.0 - mean) / std,
                               rtol=tolerance, atol=tolerance)
