"""RandAugment (arXiv:1909.13719) as DeiT trains with it (arXiv:2012.12877, table 9, and its code's operations).

Operations work on planes, (3, H, W) float32 of whole levels 0..255, and give Pillow's levels: its bicubic filter, its
rounding, its edges. They are not tensorflow-addons': those have no bicubic filter (1 to 3 levels off on average, 100 at
edges), round otherwise when sharpening, and do not compile with XLA, so that they also take longer.
"""

import math

import tensorflow as tf

from moco_tf.views import ops

_LEVELS = 256


# --- operations, named as in Pillow ---


def autocontrast(planes):
    """Stretches the levels of each plane to 0..255."""
    low = tf.reduce_min(planes, [1, 2], keepdims=True)
    spread = tf.reduce_max(planes, [1, 2], keepdims=True) - low
    stretched = tf.floor((planes - low) * 255.0 / tf.maximum(spread, 1.0))
    return tf.where(spread > 0.0, stretched, planes)


def equalize(planes):
    """Makes the levels of each plane about equally frequent."""
    level = tf.range(_LEVELS)
    places = tf.reshape(tf.cast(planes, tf.int32), [3, -1]) + _LEVELS * tf.range(3)[:, None]
    counts = tf.math.unsorted_segment_sum(tf.ones_like(places), places, 3 * _LEVELS)
    counts = tf.reshape(counts, [3, _LEVELS])
    brightest = tf.reduce_max(tf.where(counts > 0, level, 0), 1, keepdims=True)
    step = tf.reduce_sum(tf.where(level < brightest, counts, 0), 1, keepdims=True) // 255
    spread = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    table = tf.where(step > 0, tf.minimum(spread, 255), level)    # a plane of nearly one level stays as it is
    return tf.reshape(tf.gather(tf.cast(tf.reshape(table, [-1]), tf.float32), places), planes.shape)


def invert(planes):
    return 255.0 - planes


def posterize(planes, bits):
    """Keeps the `bits` highest of 8 bits, int32."""
    mask = tf.bitwise.left_shift(-1, 8 - bits)
    return tf.cast(tf.bitwise.bitwise_and(tf.cast(planes, tf.int32), mask), tf.float32)


def solarize_add(planes, amount):
    """Brightens levels below 128 by `amount`, at most to 255."""
    return tf.where(planes < 128.0, tf.minimum(planes + amount, 255.0), planes)


def sharpness(planes, factor):
    """Scales the distance of every pixel from its smoothed neighbourhood by `factor`; those at the border stay."""
    rows = planes[:, :-2] + planes[:, 1:-1] + planes[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4.0 * planes[:, 1:-1, 1:-1]
    smooth = tf.floor(total * (1.0 / 13.0) + 0.5)
    smooth = tf.concat([planes[:, 1:-1, :1], smooth, planes[:, 1:-1, -1:]], 2)
    return ops.blend(planes, tf.concat([planes[:, :1], smooth, planes[:, -1:]], 1), factor)


def affine(planes, matrix, fill):
    """Moves pixels, by the bicubic filter of Pillow's transformations (Keys' kernel with a = -1).

    Args:
        matrix: a, b, c, d, e, f: the output pixel whose centre lies at column x and row y shows what the input has at
            column a x + b y + c and row d x + e y + f.
        fill: (3,) levels of what lies outside of the input.
    """
    a, b, c, d, e, f = matrix
    _, height, width = planes.shape
    x = tf.range(width, dtype=tf.float32) + 0.5
    y = tf.range(height, dtype=tf.float32)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    inside = (x >= 0.0) & (x < width) & (y >= 0.0) & (y < height)
    left, above = tf.floor(x - 0.5), tf.floor(y - 0.5)
    pixels = tf.reshape(planes, [3, height * width])

    def along_row(i):
        row = tf.clip_by_value(tf.cast(above, tf.int32) + i, 0, height - 1)
        columns = [tf.clip_by_value(tf.cast(left, tf.int32) + j, 0, width - 1) for j in (-1, 0, 1, 2)]
        return _between([tf.gather(pixels, row * width + column, axis=1) for column in columns], x - 0.5 - left)

    value = _between([along_row(i) for i in (-1, 0, 1, 2)], y - 0.5 - above)
    outside = tf.reshape(tf.constant(fill, tf.float32), [3, 1, 1])
    return tf.where(inside, tf.floor(tf.clip_by_value(value, 0.0, 255.0)), outside)


def _between(taps, t):
    """The value at 0 <= t < 1 between the second and the third of four; exact where all four are equal."""
    p, q, r, s = taps
    return q + t * (r - p + t * (2.0 * (p - q) + r - s + t * (q - p + s - r)))


def rotate(planes, degrees, fill):
    """Turns counter-clockwise round the centre."""
    _, height, width = planes.shape
    x, y = width / 2, height / 2
    cosine, sine = tf.cos(degrees * (math.pi / 180.0)), tf.sin(degrees * (math.pi / 180.0))
    return affine(planes, (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y), fill)


def shear_x(planes, slope, fill):
    """Moves row y to the left by `slope` times y."""
    return affine(planes, (1.0, slope, 0.0, 0.0, 1.0, 0.0), fill)


def shear_y(planes, slope, fill):
    """Moves column x upwards by `slope` times x."""
    return affine(planes, (1.0, 0.0, 0.0, slope, 1.0, 0.0), fill)


def translate(planes, columns, rows, fill):
    """Moves all to the left by `columns` and upwards by `rows`, in pixels."""
    return affine(planes, (1.0, 0.0, columns, 0.0, 1.0, rows), fill)


# --- the random stage ---


def operations(planes, level, sign, fill):
    """{name: function without arguments}: the operations of DeiT at a level.

    Args:
        level: 0..1; the higher, the more an operation changes.
        sign: -1 or 1, for those that go two ways.
        fill: (3,) levels of what geometric operations uncover.
    """
    _, height, width = planes.shape
    signed = sign * level
    factor = 1.0 + 0.9 * signed
    return {
        "AutoContrast": lambda: autocontrast(planes),
        "Equalize": lambda: equalize(planes),
        "Invert": lambda: invert(planes),
        "Rotate": lambda: rotate(planes, 30.0 * signed, fill),
        "Posterize": lambda: posterize(planes, 4 - tf.cast(4.0 * level, tf.int32)),
        "Solarize": lambda: ops.solarize(planes, 256.0 - tf.floor(256.0 * level)),
        "SolarizeAdd": lambda: solarize_add(planes, tf.floor(110.0 * level)),
        "Color": lambda: ops.saturation(planes, factor),
        "Contrast": lambda: ops.contrast(planes, factor),
        "Brightness": lambda: ops.brightness(planes, factor),
        "Sharpness": lambda: sharpness(planes, factor),
        "ShearX": lambda: shear_x(planes, 0.3 * signed, fill),
        "ShearY": lambda: shear_y(planes, 0.3 * signed, fill),
        "TranslateX": lambda: translate(planes, 0.45 * signed * width, 0.0, fill),
        "TranslateY": lambda: translate(planes, 0.0, 0.45 * signed * height, fill),
    }


class RandAugment:
    """A stage (planes, numbers) -> planes of one image, as `ops.Stage`, but not of batches.

    Args:
        operations_each: drawn for an image, with replacement.
        probability: that an operation which was drawn is carried out.
        magnitude, deviation: of the normal distribution of each operation's magnitude, which is cut to 0..10.
        fill: (3,) levels of what geometric operations uncover.

    Attributes:
        count: of the numbers that the stage takes.
    """

    name = "augment"

    def __init__(self, operations_each, probability, magnitude, deviation, fill):
        self._each, self._probability, self._fill = operations_each, probability, fill
        self._magnitude, self._deviation = magnitude, deviation
        self.count = 5 * operations_each

    def __call__(self, planes, numbers):
        which, skipped, side, *normal = tf.unstack(tf.reshape(numbers, [5, self._each]))
        levels = tf.clip_by_value(self._magnitude + self._deviation * ops.normal_of(*normal), 0.0, 10.0) / 10.0
        signs = tf.where(side < 0.5, -1.0, 1.0)

        def augment(i, before):    # a loop over a switch, as in `ops.jitter`
            planes = tf.cast(before, tf.float32)
            branches = list(operations(planes, levels[i], signs[i], self._fill).values())
            chosen = tf.cast(which[i] * len(branches), tf.int32)
            chosen = tf.where(skipped[i] < self._probability, chosen, len(branches))
            return i + 1, tf.cast(tf.switch_case(chosen, [*branches, lambda: planes]), before.dtype)

        return tf.while_loop(lambda i, _: i < self._each, augment, (0, planes))[1]
