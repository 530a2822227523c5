"""Operations against Pillow's own on a photograph and on noise; draws against counts."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from moco_tf.views import ops, randaugment

FILL = (124, 116, 104)
IMAGES = {
    "photo": load_sample_image("flower.jpg")[100:180, 260:350],
    "noise": np.random.default_rng(0).integers(0, 256, (31, 44, 3), np.uint8),
    "few levels": np.random.default_rng(0).integers(60, 64, (31, 44, 3), np.uint8),
    "one level": np.full((8, 9, 3), 200, np.uint8),
}


def moved(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)


def brightened(image, amount):
    return image.point([min(255, i + amount) if i < 128 else i for i in range(256)] * 3)


PILLOW = {    # (image, level, sign) -> image: DeiT's table of operations, in Pillow's own
    "AutoContrast": lambda image, v, s: ImageOps.autocontrast(image),
    "Equalize": lambda image, v, s: ImageOps.equalize(image),
    "Invert": lambda image, v, s: ImageOps.invert(image),
    "Rotate": lambda image, v, s: image.rotate(s * 30 * v, Image.Resampling.BICUBIC, fillcolor=FILL),
    "Posterize": lambda image, v, s: image.point([i & -(1 << 8 - (4 - int(4 * v))) & 255 for i in range(256)] * 3),
    "Solarize": lambda image, v, s: ImageOps.solarize(image, 256 - int(256 * v)),
    "SolarizeAdd": lambda image, v, s: brightened(image, int(110 * v)),
    "Color": lambda image, v, s: ImageEnhance.Color(image).enhance(1 + s * 0.9 * v),
    "Contrast": lambda image, v, s: ImageEnhance.Contrast(image).enhance(1 + s * 0.9 * v),
    "Brightness": lambda image, v, s: ImageEnhance.Brightness(image).enhance(1 + s * 0.9 * v),
    "Sharpness": lambda image, v, s: ImageEnhance.Sharpness(image).enhance(1 + s * 0.9 * v),
    "ShearX": lambda image, v, s: moved(image, (1, s * 0.3 * v, 0, 0, 1, 0)),
    "ShearY": lambda image, v, s: moved(image, (1, 0, 0, s * 0.3 * v, 1, 0)),
    "TranslateX": lambda image, v, s: moved(image, (1, 0, s * 0.45 * v * image.width, 0, 1, 0)),
    "TranslateY": lambda image, v, s: moved(image, (1, 0, 0, 0, 1, s * 0.45 * v * image.height)),
}
# The share of numbers that may be a level apart. Pillow computes these in float64 and truncates, which shows where a
# result is a whole number but for rounding errors: AutoContrast's of the brightest pixels, for one.
A_LEVEL_APART = {"AutoContrast": 0.05, "Rotate": 0.005, "ShearX": 0.005, "ShearY": 0.005, "TranslateX": 0.005,
                 "TranslateY": 0.005}
LEVELS = [(0.0, 1.0), (0.31, -1.0), (0.917, 1.0), (0.957, -1.0), (1.0, 1.0)]


def test_operations_are_deits():
    assert list(randaugment.operations(tf.zeros([3, 8, 8]), 0.9, 1.0, FILL)) == list(PILLOW)


@pytest.mark.parametrize("image, xla", [(name, False) for name in IMAGES] + [("photo", True)])
@pytest.mark.parametrize("name", PILLOW)
def test_operation_gives_pillows_levels(name, image, xla):
    image = IMAGES[image]
    planes = ops.to_planes(tf.constant(image))

    def apply(level, sign):
        return randaugment.operations(planes, level, sign, FILL)[name]()

    if xla:
        apply = tf.function(apply, jit_compile=True)
    for level, sign in LEVELS:
        ours = apply(tf.constant(level), tf.constant(sign))
        pillows = np.asarray(PILLOW[name](Image.fromarray(image), level, sign), np.float64)
        errors = np.abs(np.transpose(ours, [1, 2, 0]) - pillows)
        assert errors.max() <= 1
        assert np.mean(errors > 0) <= A_LEVEL_APART.get(name, 0.0)


def drawn(monkeypatch, operations, start, seeds, **settings):
    """The stage's results for so many seeds, with other operations in it."""
    monkeypatch.setattr(randaugment, "operations", operations)
    stage = randaugment.RandAugment(**{**dict(operations_each=2, probability=0.5, magnitude=9.0, deviation=0.5, fill=FILL),
                                       **settings})
    seeds = tf.stack([tf.range(seeds), tf.ones([seeds], tf.int32)], 1)
    return tf.function(lambda: tf.map_fn(lambda seed: stage(tf.constant(start), ops.uniform(seed, [stage.count])), seeds,
                                         fn_output_signature=tf.float32), jit_compile=True)().numpy()


def test_operations_are_drawn_equally_often_and_half_of_them_carried_out(monkeypatch):
    def digits(planes, level, sign, fill):    # each carried out appends its own to a number of base 16
        return {name: lambda k=k: planes * 16.0 + (k + 1.0) for k, name in enumerate(PILLOW)}

    count = 24_000
    numbers = drawn(monkeypatch, digits, 0.0, count).astype(int)
    both = numbers[numbers >= 16]
    np.testing.assert_allclose([np.mean(numbers == 0), len(both) / count], 0.25, atol=0.015)
    for digit in (both // 16, both % 16, numbers[(numbers > 0) & (numbers < 16)]):
        counts = np.bincount(digit, minlength=16)[1:]
        expected = len(digit) / 15
        assert np.sum((counts - expected) ** 2 / expected) < 45      # chi-squared, 14 degrees of freedom: p = 4e-5
    assert 0.05 < np.mean(both // 16 == both % 16) < 0.085      # with replacement: 1/15


def test_magnitudes_are_normal_and_cut_at_ten(monkeypatch):
    levels, signs = drawn(monkeypatch, lambda planes, level, sign, fill: {"": lambda: tf.stack([level, sign])},
                          [0.0, 0.0], 20_000, operations_each=1, probability=1.0).T
    assert levels.max() == 1.0
    np.testing.assert_allclose(np.mean(levels == 1.0), 0.0228, atol=0.004)      # P(z > 2)
    np.testing.assert_allclose(np.quantile(levels, [0.1, 0.5, 0.9]), [0.8359, 0.9, 0.9641], atol=0.003)
    np.testing.assert_allclose(np.unique(signs, return_counts=True)[1], [10_000, 10_000], atol=350)
