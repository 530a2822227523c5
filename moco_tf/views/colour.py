"""Colour spaces as scikit-image defines them, and how CMC normalises them (arXiv:1906.05849, sec. 4, and its code).

A space is a function of three tensors of one shape, red, green and blue in 0..1, to three tensors of that shape. They
stay apart because a last axis of 3 defeats vectorisation. Powers are made of multiplications, because logarithms took most
of the time, and end in a square root: XLA computes that once for all that it is part of, and cheaper operations anew for
each. Nothing is random and nothing depends on more than one pixel.
"""

import math
from typing import Callable, NamedTuple

import numpy as np
import tensorflow as tf

from moco_tf.errors import UsageError

_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)                # D65, seen by the observer of 2 degrees
_YUV = ((0.299, 0.587, 0.114), (-0.14714119, -0.28886916, 0.43601035), (0.61497538, -0.51496512, -0.10001026))
_YIQ = ((0.299, 0.587, 0.114), (0.59590059, -0.27455667, -0.32134392), (0.21153661, -0.52273617, 0.31119955))
_YPBPR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_YDBDR = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))
_YCBCR = ((65.481, 128.553, 24.966), (-37.797, -74.203, 112.0), (112.0, -93.786, -18.214))
# The CIE 1931 primaries give XYZ; the space is the other way round.
_CIERGB = (np.linalg.inv(np.array([[0.49, 0.31, 0.20], [0.17697, 0.81240, 0.01063], [0.00, 0.01, 0.99]]) / 0.17697)
           @ np.array(_XYZ)).tolist()
# Each row: how much haematoxylin, eosin and DAB absorb of red, green and blue (Ruifrok and Johnston, 2001).
_HED = np.linalg.inv([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]).T.tolist()
_DARKEST = 1e-6                                 # of HED, whose logarithm would otherwise have no end
_CUBE_FROM = 0.008856                           # of Lab and LUV: below it a line takes the place of the cube root


def _product(matrix, red, green, blue):
    return tuple(r * red + g * green + b * blue for r, g, b in matrix)


def _inverse_root(value, degree):
    """value ** (-1 / degree), value > 0, to the last bits. The bits of a floating point number nearly are its logarithm;
    a part of that, in whole numbers, is a guess within four per cent, and each of Newton's steps squares the error."""
    whole, half, mantissa, steps = (tf.int32, 16, 23, 3) if value.dtype == tf.float32 else (tf.int64, 32, 52, 4)
    one = int(np.array(1.0, value.dtype.as_numpy_dtype).view(whole.as_numpy_dtype))
    middle = int(0.063 * 2 ** mantissa)     # of the guess's errors, which are all of one sign
    part = tf.bitwise.right_shift(tf.bitcast(value, whole), half) * (2 ** half // degree)
    root = tf.bitcast(one + one // degree - middle - part, value.dtype)
    for _ in range(steps):
        power = root
        for _ in range(degree - 1):
            power *= root
        root *= (degree + 1.0) / degree - (1.0 / degree) * value * power
    return root


def _linear_light(value):
    """sRGB to linear light."""
    base = (tf.maximum(value, 0.04045) + 0.055) * (1.0 / 1.055)
    square = base * base
    power = square * square * base * _inverse_root(base, 5)    # base ** 4.8
    return tf.sqrt(tf.where(value > 0.04045, power, tf.square(value * (1.0 / 12.92))))


def _cube_root(value):
    """Of values from `_CUBE_FROM` on, and below it Lab's line."""
    above = tf.maximum(value, _CUBE_FROM)
    power = above * _inverse_root(above, 3)     # above ** (2 / 3)
    return tf.sqrt(tf.where(value > _CUBE_FROM, power, tf.square(7.787 * value + 16.0 / 116.0)))


def xyz(red, green, blue):
    """CIE XYZ, white at Y = 1."""
    return _product(_XYZ, *(_linear_light(value) for value in (red, green, blue)))


def lab(red, green, blue):
    """CIE L*a*b*: L in 0..100."""
    x, y, z = (_cube_root(value * (1.0 / white)) for value, white in zip(xyz(red, green, blue), _WHITE))
    return 116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)


def luv(red, green, blue):
    """CIE L*u*v*: L in 0..100."""
    x, y, z = xyz(red, green, blue)
    lightness = tf.where(y > _CUBE_FROM, 116.0 * _cube_root(y) - 16.0, 903.3 * y)
    white_x, white_y, white_z = _WHITE
    white_sum = white_x + 15.0 * white_y + 3.0 * white_z
    per_sum = 1.0 / (x + 15.0 * y + 3.0 * z + 2.0 ** -52)    # black has lightness 0, and no hue to speak of
    return (lightness, 13.0 * lightness * (4.0 * x * per_sum - 4.0 * white_x / white_sum),
            13.0 * lightness * (9.0 * y * per_sum - 9.0 * white_y / white_sum))


def ycbcr(red, green, blue):
    """ITU-R BT.601 of limited range: Y in 16..235, Cb and Cr in 16..240, unlike JPEG's."""
    y, cb, cr = _product(_YCBCR, red, green, blue)
    return y + 16.0, cb + 128.0, cr + 128.0


def hsv(red, green, blue):
    """Hue (first), saturation, value, each 0..1; grey has hue 0."""
    value = tf.maximum(tf.maximum(red, green), blue)
    spread = value - tf.minimum(tf.minimum(red, green), blue)
    per_spread = 1.0 / tf.where(spread > 0.0, spread, 1.0)
    sixths = tf.where(
        blue == value, 4.0 + (red - green) * per_spread,
        tf.where(green == value, 2.0 + (blue - red) * per_spread, (green - blue) * per_spread))
    hue = tf.where(sixths < 0.0, sixths + 6.0, sixths) * (1.0 / 6.0)
    return tf.where(spread > 0.0, hue, 0.0), spread / tf.where(value > 0.0, value, 1.0), value


def hed(red, green, blue):
    """Haematoxylin, eosin and DAB: the stains of histology, 0 or more."""
    absorbed = (tf.math.log(tf.maximum(value, _DARKEST)) * (1.0 / math.log(_DARKEST)) for value in (red, green, blue))
    return tuple(tf.maximum(stain, 0.0) for stain in _product(_HED, *absorbed))


def yuv(red, green, blue):
    """PAL's luma and colour differences."""
    return _product(_YUV, red, green, blue)


def yiq(red, green, blue):
    """NTSC's luma and colour differences."""
    return _product(_YIQ, red, green, blue)


def ypbpr(red, green, blue):
    """YCbCr as real numbers: Y in 0..1, the differences in -0.5..0.5."""
    return _product(_YPBPR, red, green, blue)


def ydbdr(red, green, blue):
    """SECAM's luma and colour differences."""
    return _product(_YDBDR, red, green, blue)


def ciergb(red, green, blue):
    """CIE RGB (1931), from the values as they are: scikit-image does not make them linear first."""
    return _product(_CIERGB, red, green, blue)


class Space(NamedTuple):
    """A colour space, and the constants with which its three channels are normalised: (x - middle) / half_range."""

    convert: Callable
    middle: tuple
    half_range: tuple


# YCbCr's constants are those of CMC's code, which does not say where they come from. Lab's, also of its code, are the
# middle and half the range of what RGB can reach; so are the others', which CMC has no constants for.
SPACES = {
    "Lab": Space(lab, (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)),
    "YCbCr": Space(ycbcr, (116.151, 121.080, 132.342), (109.500, 111.855, 111.964)),
    "HSV": Space(hsv, (0.499, 0.5, 0.5), (0.499, 0.5, 0.5)),
    "HED": Space(hed, (0.939, 0.567, 0.787), (0.939, 0.567, 0.787)),
    "LUV": Space(luv, (50.0, 45.968, -13.349), (50.0, 129.046, 120.748)),
    "YUV": Space(yuv, (0.5, 0.0, 0.0), (0.5, 0.436, 0.615)),
    "XYZ": Space(xyz, (0.4752, 0.5, 0.5444), (0.4752, 0.5, 0.5444)),
    "YDbDr": Space(ydbdr, (0.5, 0.0, 0.0), (0.5, 1.333, 1.333)),
    "YPbPr": Space(ypbpr, (0.5, 0.0, 0.0), (0.5, 0.5, 0.5)),
    "YIQ": Space(yiq, (0.5, 0.0, 0.0), (0.5, 0.5959, 0.5227)),
    "CIERGB": Space(ciergb, (0.0744, 0.0914, 0.0964), (0.0891, 0.0914, 0.0964)),
}


def convert(rgb, space, axis=0, dtype=tf.float32):
    """Red, green and blue to another colour space.

    Args:
        rgb: levels 0..255 of any dtype and shape, with the 3 on `axis`: planes (3, H, W) by default, or with axis -1
            images (H, W, 3) and (B, H, W, 3).
        space: one of SPACES.
        axis: where the colours are, and where the channels will be. Under XLA on a CPU the last axis takes five times
            as long as the first; without XLA, half as long again.
        dtype: tf.float32 or tf.float64, of the arithmetic and the result.

    Returns:
        A tensor of the shape of `rgb`, in the units of scikit-image.

    Raises:
        UsageError: no such space.
    """
    return tf.stack(_channels(rgb, space, axis, dtype), axis)


def normalized(rgb, space, axis=0, dtype=tf.float32):
    """As `convert`, each channel less the `middle` of the space and divided by its `half_range`."""
    channels = _channels(rgb, space, axis, dtype)
    _, middle, half_range = SPACES[space]
    return tf.stack([(c - m) * (1.0 / h) for c, m, h in zip(channels, middle, half_range)], axis)


def require_space(space):
    """Raises UsageError where there is no such space."""
    if space not in SPACES:
        raise UsageError(f"A colour space must be one of {', '.join(SPACES)}. Received: {space!r}.")


def _channels(rgb, space, axis, dtype):
    require_space(space)
    return SPACES[space].convert(*(tf.cast(level, dtype) * (1.0 / 255.0) for level in tf.unstack(rgb, 3, axis)))
