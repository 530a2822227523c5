"""What a view does to an image, as torchvision and Pillow define it.

Colour functions work on *planes*: (3, H, W) float32, red, green and blue, 0..255; or (3, B, H, W) of a batch, with
(B, 1, 1) for each number. The planes come first because a last axis of 3 defeats vectorisation. With `levels` true (the
default) every function returns whole grey levels by Pillow's arithmetic, which is what the published recipes ran; false
gives torchvision's real-valued formulas for tensors. Geometry takes images of any number of channels.

Random stages (`Stage`) are made by `random_*`. Between them levels are stored as bytes, uint8 planes: a fourth of the
memory traffic. Their numbers depend on the seed alone and are the same with and without XLA.
"""

import collections
import functools
import itertools
import math

import tensorflow as tf

from moco_tf.errors import UsageError

_BOX_PASSES = 3
_HALF = 0.5 + 2.0 ** -12        # up to rounding errors just below it
MAX_SIGMA = math.sqrt(6.0)      # from here on Pillow's box is wider than the five taps of `box_blur`


def uniform(seed, shape):
    """Uniform float32 numbers in [0, 1), multiples of 2^-24, a function of `seed`, (2,) int32.

    Made from integers, because `tf.random.stateless_uniform` of floats differs between XLA and plain TensorFlow.
    """
    bits = tf.random.stateless_uniform(shape, seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox")
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.float32) * 2.0 ** -24


def normal(seed, shape):
    """Standard normal float32 numbers, a function of `seed`, (2,) int32."""
    return normal_of(*tf.unstack(uniform(seed, [2, *shape])))


def normal_of(radius, turn):
    """Standard normal numbers from two uniform ones in [0, 1) (Box and Muller, 1958)."""
    return tf.sqrt(-2.0 * tf.math.log(1.0 - radius)) * tf.cos(2.0 * math.pi * turn)


def split(seed, count):
    """`count` independent seeds, (count, 2), from one."""
    return tf.random.split(seed, count, alg="philox")


# --- planes and images ---


def to_planes(image):
    """(..., H, W, C) uint8 -> (C, ..., H, W) float32."""
    last = image.shape.rank - 1
    return tf.transpose(tf.cast(image, tf.float32), [last, *range(last)])


def to_image(planes):
    """(C, ..., H, W) uint8 -> (..., H, W, C) uint8."""
    rank = planes.shape.rank
    return interleave(planes) if rank == planes.shape[0] == 3 else tf.transpose(planes, [*range(1, rank), 0])


def nearest(x):
    """Rounds to whole levels 0..255. Halves go up, and so does what rounding errors put just below a half."""
    return tf.clip_by_value(tf.floor(x + _HALF), 0.0, 255.0)


def to_levels(columns, interpolation):
    """What `resample` gives -> whole levels, uint8."""
    if interpolation == "bicubic":      # which overshoots
        return tf.cast(nearest(columns), tf.uint8)
    return tf.cast(columns + _HALF, tf.uint8)


def interleave(planes):
    """(3, ...) of any dtype -> (..., 3). Compiled by XLA, a transposition would compute its planes unvectorised; this
    selects instead, three times as fast after Lab, and twice as fast after a jitter."""
    first, second, third = (plane[..., None] for plane in tf.unstack(planes))
    channel = tf.range(3)
    return tf.where(channel == 0, first, tf.where(channel == 1, second, third))


# --- geometry ---

Frame = collections.namedtuple("Frame", "low length start scale")
Frame.__doc__ = """Where an output lies on an input: (..., 2) tensors, of rows and of columns.

Pixels `low` to `low + length` of the input take part (int32); the centre of output pixel i is at
`low + start + (i + 0.5) * scale` (float32), in input pixels.
"""

Crop = collections.namedtuple("Crop", "count frame")
Crop.__doc__ = """`count` of the numbers that it takes, and (shape (2,), numbers (..., count)) -> a Frame of (..., 2)."""


def tries_of(numbers):
    """The first 20 of (..., n) numbers as ten pairs, (..., 10, 2)."""
    return tf.reshape(numbers[..., :20], tf.concat([tf.shape(numbers)[:-1], [10, 2]], 0))


def first_fit(fits, values, otherwise):
    """The first of `values`, (..., n), where `fits`; `otherwise` where none does."""
    order = tf.range(fits.shape[-1], dtype=tf.int32)
    first = tf.reduce_min(tf.where(fits, order, fits.shape[-1]), -1, keepdims=True)
    found = tf.reduce_sum(tf.where(order == first, values, 0.0), -1)
    return tf.where(tf.reduce_any(fits, -1), found, otherwise)


def sides_of(numbers, height, width, scale, ratio):
    """Sides of boxes: their area uniform, their aspect uniform on a log scale.

    Args:
        numbers: (..., 2) uniform in [0, 1).
        height, width: of the image, float32.
        scale: (least, most) area of the box, as a fraction of the image's.
        ratio: (least, most) width / height.

    Returns:
        heights, widths: (...,) whole float32 numbers, which need not fit into the image.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * numbers[..., 0])
    aspect = tf.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * numbers[..., 1])
    return tf.round(tf.sqrt(area / aspect)), tf.round(tf.sqrt(area * aspect))


def crop_box(numbers, height, width, scale, ratio=(3 / 4, 4 / 3)):
    """Boxes of torchvision's RandomResizedCrop: the first of several tries that fits, else the largest centred one.

    Args:
        numbers: (..., 22) uniform in [0, 1): ten tries of area and aspect, then the position.
        height, width: of the image, integers.
        scale, ratio: as in `sides_of`.

    Returns:
        top, left, height, width: (...,) int32 each.
    """
    image_height, image_width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    heights, widths = sides_of(tries_of(numbers), image_height, image_width, scale, ratio)
    fits = (widths > 0) & (widths <= image_width) & (heights > 0) & (heights <= image_height)
    box_height = first_fit(fits, heights, tf.minimum(image_height, tf.round(image_width / ratio[0])))
    box_width = first_fit(fits, widths, tf.minimum(image_width, tf.round(image_height * ratio[1])))
    room_above, room_left = image_height - box_height, image_width - box_width
    drawn = tf.reduce_any(fits, -1)
    top = tf.where(drawn, tf.floor(numbers[..., 20] * (room_above + 1)), tf.floor(room_above / 2))
    left = tf.where(drawn, tf.floor(numbers[..., 21] * (room_left + 1)), tf.floor(room_left / 2))
    return tuple(tf.cast(x, tf.int32) for x in (top, left, box_height, box_width))


def random_crop(size, scale):
    """torchvision's RandomResizedCrop.

    Args:
        size: side of the output.
        scale: (least, most) area of the crop, as a fraction of the image's.
    """
    if not 0.0 < scale[0] <= scale[1] <= 1.0:
        raise UsageError(
            "A crop's least and most area must be fractions of the image, 0 < least <= most <= 1. "
            f"Received: {scale[0]}, {scale[1]}. Set views.crop_min to something like 0.2.")

    def frame(shape, numbers):
        top, left, height, width = crop_box(numbers, shape[0], shape[1], scale)
        length = tf.stack([height, width], -1)
        sides = tf.cast(length, tf.float32)
        return Frame(tf.stack([top, left], -1), length, tf.zeros_like(sides), sides * (1.0 / size))
    return Crop(22, frame)


def central_crop(size, shorter_side):
    """Shorter side to `shorter_side`, then the middle `size` x `size` pixels."""
    def frame(shape, numbers):
        resized = shorter_side * shape // tf.reduce_min(shape)
        scale = tf.cast(shape, tf.float32) / tf.cast(resized, tf.float32)
        start = tf.round(tf.cast(resized - size, tf.float32) / 2.0) * scale
        each = tf.concat([tf.shape(numbers)[:-1], [2]], 0)
        return Frame(*(tf.broadcast_to(part, each) for part in (tf.zeros_like(shape), shape, start, scale)))
    return Crop(1, frame)    # XLA on CPUs does not survive arrays without elements; the number is not used


def triangle(distance):
    return tf.nn.relu(1.0 - distance)


def cubic(distance):
    """Keys' kernel with a = -1/2."""
    near = (1.5 * distance - 2.5) * distance * distance + 1.0
    far = ((2.5 - 0.5 * distance) * distance - 4.0) * distance + 2.0
    return tf.where(distance < 1.0, near, tf.where(distance < 2.0, far, 0.0))


Filter = collections.namedtuple("Filter", "kernel radius")
Filter.__doc__ = """An interpolation: distances in pixels to weights, and the distance at which these end."""

FILTERS = {"bilinear": Filter(triangle, 1.0), "bicubic": Filter(cubic, 2.0)}


def filter_weights(frame, size, pixels, kernel):
    """An antialiased filter: widened when shrinking, of sum 1 within the frame.

    Args:
        frame: a Frame.
        size: side of the output.
        pixels: (..., 2, size, taps) or (..., 2, 1, taps) integers, pixels to weigh for each output pixel, counted from
            `frame.low`.
        kernel: distances to weights.

    Returns:
        (..., 2, size, taps) float32, 0 for pixels outside the frame.
    """
    length, scale = tf.cast(frame.length, pixels.dtype)[..., None, None], frame.scale[..., None, None]
    distance = tf.abs(tf.cast(pixels, tf.float32) + 0.5 - _centres(frame, size)[..., None])
    weights = kernel(distance / tf.maximum(scale, 1.0))
    weights = tf.where((pixels >= 0) & (pixels < length), weights, 0.0)
    return weights / tf.reduce_sum(weights, -1, keepdims=True)


def _centres(frame, size):
    """(..., 2, size) of the output's pixels, counted from `frame.low`."""
    return frame.start[..., None] + (tf.range(size, dtype=tf.float32) + 0.5) * frame.scale[..., None]


def resample(image, frames, size, interpolation="bilinear"):
    """Antialiased resize of parts of an image of any shape, on the host.

    Only a few pixels have a weight in each output pixel, so the filter is sparse: half the time of `tf.image.resize`
    with antialias, for the same numbers. What is small is computed for all parts at once, because starting an operation
    takes longer than its work.

    The bicubic filter overshoots beside edges, so that it matters what Pillow does between its two passes: it resizes
    along rows first, and cuts and rounds to whole levels. Without that, single pixels come out up to 30 levels off.

    Args:
        image: (H, W, C) uint8, C known while tracing.
        frames: F parts, and how each is scaled: a Frame of (F, 2), F known while tracing.
        size: side of the output.
        interpolation: of FILTERS.

    Returns:
        F times (size, C, size) float32: columns, channels, rows. Between the products, and after them, only matrices are
        transposed, which is far faster than with a last axis of 3.
    """
    channels = image.shape[-1]
    kernel, radius = FILTERS[interpolation]
    radius *= tf.maximum(frames.scale, 1.0)[..., None]
    taps = tf.range(tf.cast(2.0 * tf.reduce_max(radius), tf.int64) + 1)
    pixels = tf.cast(tf.math.ceil(_centres(frames, size) - radius - 0.5), tf.int64)[..., None] + taps
    length = tf.cast(frames.length, tf.int64)
    inputs = tf.clip_by_value(pixels, 0, length[..., None, None] - 1)
    outputs = tf.broadcast_to(tf.range(size, dtype=tf.int64)[:, None], tf.shape(inputs))
    weights, places = filter_weights(frames, size, pixels, kernel), tf.stack([outputs, inputs], -1)

    def product(axis, each=1):
        """F filters along an axis, `each` numbers to a pixel: of lines (length * each, n), or of (n, length * each)."""
        number = tf.range(each, dtype=tf.int64)[:, None, None]
        of_each = places[:, axis, :, None] * each + number    # (F, size, each, taps, 2)
        values = tf.broadcast_to(weights[:, axis, :, None], tf.shape(of_each)[:-1])
        lengths = length[:, axis]
        shapes = tf.stack([tf.fill(tf.shape(lengths), tf.constant(size, tf.int64)), lengths], 1) * each
        count = frames.low.shape[0]
        parts = [tf.unstack(part) for part in (
            tf.reshape(of_each, [count, -1, 2]), tf.reshape(values, [count, -1]), shapes)]
        filters = [tf.SparseTensor(*part) for part in zip(*parts)]
        return lambda which, lines, transposed=False: tf.sparse.sparse_dense_matmul(
            filters[which], lines, adjoint_b=transposed)

    starts, sides = (tf.unstack(tf.pad(part, [[0, 0], [0, 1]], constant_values=fill))
                     for part, fill in ((frames.low, 0), (frames.length, channels)))
    cut = [tf.slice(image, start, side) for start, side in zip(starts, sides)]
    if interpolation == "bicubic":
        along_rows, along_columns = product(1), product(0)

        def resized(which, part):
            height, width, _ = tf.unstack(sides[which])
            part = tf.cast(tf.transpose(part, [1, 0, 2]), tf.float32)
            part = nearest(along_rows(which, tf.reshape(part, [width, height * channels])))
            part = tf.transpose(tf.reshape(part, [size, height, channels]), [1, 0, 2])
            part = along_columns(which, tf.reshape(part, [height, size * channels]))
            return tf.reshape(tf.transpose(part), [size, channels, size])
    else:
        along_columns, along_rows = product(0), product(1, channels)
        lines = tf.unstack(frames.length * [1, channels])

        def resized(which, part):
            part = along_columns(which, tf.cast(tf.reshape(part, lines[which]), tf.float32))
            return tf.reshape(along_rows(which, part, transposed=True), [size, channels, size])

    return [resized(which, part) for which, part in enumerate(cut)]


def resample_planes(image, frame, size, interpolation="bilinear"):
    """As `resample`, for a static image shape, by full matrices: XLA can compile it. For small images.

    Returns:
        (C, size, size) float32 planes. `frame` is of (2,).
    """
    height, width, channels = image.shape
    side = max(height, width)
    weights = filter_weights(frame, size, tf.range(side) - frame.low[:, None, None], FILTERS[interpolation].kernel)
    over_rows, over_columns = weights[0, :, :height], weights[1, :, :width]
    part = tf.cast(image, tf.float32)
    if interpolation == "bicubic":
        part = tf.reshape(tf.transpose(part, [0, 2, 1]), [height * channels, width])
        part = nearest(tf.matmul(part, over_columns, transpose_b=True))
        part = tf.matmul(over_rows, tf.reshape(part, [height, channels * size]))
        return tf.transpose(tf.reshape(part, [size, channels, size]), [1, 0, 2])
    part = tf.matmul(over_rows, tf.reshape(part, [height, width * channels]))
    part = tf.transpose(tf.reshape(part, [size, width, channels]), [2, 0, 1])
    part = tf.matmul(tf.reshape(part, [channels * size, width]), over_columns, transpose_b=True)
    return tf.reshape(part, [channels, size, size])


# --- colour ---


def grey(planes, levels=True):
    """(H, W) luma: ITU-R 601 in Pillow's 16-bit fractions, or torchvision's .2989, .587, .114 for tensors."""
    red, green, blue = planes[0], planes[1], planes[2]
    if levels:      # exact in float32: the sum stays below 2^24
        return tf.floor((19595.0 * red + 38470.0 * green + 7471.0 * blue + 32768.0) * 2.0 ** -16)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def grayscale(planes, levels=True):
    """The luma in all three planes."""
    return tf.zeros_like(planes) + grey(planes, levels)


def blend(planes, other, factor, levels=True):
    """Pillow's Image.blend, which truncates: `other` at factor 0, `planes` at 1, and beyond."""
    mixed = tf.clip_by_value(other + factor * (planes - other), 0.0, 255.0)
    return tf.floor(mixed) if levels else mixed


def brightness(planes, factor, levels=True):
    """Scales all levels by `factor`."""
    return blend(planes, 0.0, factor, levels)


def contrast(planes, factor, levels=True):
    """Scales the distance of all levels from the mean luma by `factor`."""
    mean = tf.reduce_mean(grey(planes, levels), [-2, -1], keepdims=True)
    return blend(planes, tf.floor(mean + 0.5) if levels else mean, factor, levels)


def saturation(planes, factor, levels=True):
    """Scales the distance of every pixel from its luma by `factor`."""
    return blend(planes, grey(planes, levels), factor, levels)


def hue(planes, turn, levels=True):
    """Turns the hue by `turn` of the circle, -0.5 to 0.5, in HSV; with `levels` in Pillow's HSV of 8 bits."""
    red, green, blue = planes[0], planes[1], planes[2]
    value = tf.maximum(tf.maximum(red, green), blue)
    spread = value - tf.minimum(tf.minimum(red, green), blue)
    # In sixths of the circle. Where the spread is 0 all differences are 0, and so is the hue.
    per_spread = 1.0 / tf.maximum(spread, 1e-9)
    sixths = tf.where(red == value, (green - blue) * per_spread,
                      tf.where(green == value, 2.0 + (blue - red) * per_spread, 4.0 + (red - green) * per_spread))
    sixths = _wrap(sixths, 6.0)
    fraction = spread / tf.maximum(value, 1e-9)
    if levels:
        # Pillow truncates to 8 bits, and finds pure green and pure blue just below 85 and 170.
        steps = tf.floor(tf.maximum(sixths * 42.5 - 1e-4, 0.0)) + tf.cast(tf.cast(turn * 255.0, tf.int32), tf.float32)
        sixths = _wrap(steps, 256.0) * (6.0 / 255.0)
        fraction = tf.floor(fraction * 255.0) * (1.0 / 255.0)
    else:
        sixths = _wrap(sixths + 6.0 * turn, 6.0)
    # How far each plane is from its sector of full value, in sixths of the circle: red's sector is around 0.
    offset = _wrap(tf.reshape([5.0, 3.0, 1.0], [3] + [1] * sixths.shape.rank) + sixths, 6.0)
    turned = value - value * fraction * tf.clip_by_value(tf.minimum(offset, 4.0 - offset), 0.0, 1.0)
    return tf.floor(turned + 0.5) if levels else turned


def _wrap(x, period):
    """Into [0, period) from one period below or above; tf.math.floormod is not vectorised and far slower."""
    return tf.where(x < 0.0, x + period, tf.where(x < period, x, x - period))


JITTERS = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}


def jitter(planes, names, factors, order, levels=True):
    """Adjustments one after the other, as torchvision's ColorJitter.

    A loop over a switch, because XLA compiles that in a tenth of the time of several switches in a row, and really
    skips what is not asked for. Whole levels are carried from one to the next as bytes.

    Args:
        names: of some of `JITTERS`.
        factors: (len(names),) of each.
        order: (n,) int32, positions in `names`, in the order in which they apply.
    """
    stored = tf.uint8 if levels else planes.dtype

    def adjust(i, before):
        def by(k, name):
            return tf.cast(JITTERS[name](tf.cast(before, planes.dtype), factors[k], levels), stored)

        return i + 1, tf.switch_case(order[i], [functools.partial(by, k, name) for k, name in enumerate(names)])

    adjusted = tf.while_loop(lambda i, _: i < tf.size(order), adjust, (0, tf.cast(planes, stored)))[1]
    return tf.cast(adjusted, planes.dtype)


def box_weights(sigma):
    """Weights of the pixels at distance 1 and 2 in one of Pillow's box blurs, and what all five weights lack of 1.

    For GaussianBlur(sigma) the box of half-width l + a has 2 l + 1 full pixels and a fraction a of the next on either
    side; three of them have the variance of the Gaussian (Gwosdek et al., Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering, 2011). Five taps hold it for sigma < `MAX_SIGMA`.
    """
    variance = sigma * sigma / _BOX_PASSES
    whole = tf.floor((tf.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    part = (2.0 * whole + 1.0) * (whole * (whole + 1.0) - 3.0 * variance)
    part /= 6.0 * (variance - (whole + 1.0) ** 2)
    # Pillow holds weights as whole 2^-24ths; those decide the ties that round sigmas make frequent.
    full = tf.floor(2.0 ** 24 / (2.0 * (whole + part) + 1.0))
    rest = tf.floor((2.0 ** 24 - (2.0 * whole + 1.0) * full) / 2.0)
    lost = 2.0 ** 24 - (2.0 * whole + 1.0) * full - 2.0 * rest
    near, far = tf.where(whole > 0.0, full, rest), tf.where(whole > 0.0, rest, 0.0)
    return near * 2.0 ** -24, far * 2.0 ** -24, lost * 2.0 ** -24


def box_blur(planes, weights, levels=True):
    """One pass along the second to last axis, of (..., L + 4, n), where the first and the last two lines are outside."""
    near, far, lost = weights
    length = planes.shape[-2] - 4
    lines = [planes[..., start:start + length, :] for start in range(5)]
    # Differences from the centre keep exact halves apart from their neighbours in float32.
    change = (near * (lines[1] + lines[3] - 2.0 * lines[2]) + far * (lines[0] + lines[4] - 2.0 * lines[2])
              - lost * lines[2])
    return lines[2] + (tf.floor(change + 0.5) if levels else change)


def blur(planes, sigma, levels=True):
    """Pillow's GaussianBlur(sigma), 0 < sigma < `MAX_SIGMA`: three box blurs along rows, then three along columns.

    Both run along the second to last axis, where edges, which are repeated outside, are whole lines and XLA vectorises
    everything. Whole levels are carried from one pass to the next as bytes.

    Args:
        planes: (3, H, W), or (3, B, H, W).
        sigma: (), or (B, 1, 1).
    """
    weights, stored = box_weights(sigma), tf.uint8 if levels else planes.dtype

    def three(lines):
        # A loop, because XLA would otherwise fuse the passes and compute each again for every tap of the next.
        def one(i, lines):
            first, last = lines[..., :1, :], lines[..., -1:, :]
            around = tf.cast(tf.concat([first, first, lines, last, last], -2), planes.dtype)
            return i + 1, tf.cast(box_blur(around, weights, levels), stored)
        return tf.while_loop(lambda i, _: i < _BOX_PASSES, one, (0, lines))[1]

    turned = three(tf.linalg.matrix_transpose(tf.cast(planes, stored)))
    return tf.cast(three(tf.linalg.matrix_transpose(turned)), planes.dtype)


def solarize(planes, threshold=128):
    """Inverts levels from `threshold` on."""
    return tf.where(planes < threshold, planes, 255.0 - planes)


def flip(planes):
    """Left to right."""
    return tf.reverse(planes, [-1])


# --- random stages ---


class Stage:
    """A change that a view goes through at random: (planes, numbers) -> planes of one image, of the same dtype.

    Args:
        name: for tables.
        probability: of the change; otherwise the planes stay what they are.
        change: (planes float32, numbers) -> planes; `numbers` (count,) uniform in [0, 1).
        count: of the numbers that the change takes.
        change_batch: the same of planes (3, B, H, W), each of the numbers (B, 1, 1); None: `change` takes them.

    Attributes:
        count: of the numbers that the stage takes: whether, and those of the change.
    """

    def __init__(self, name, probability, change, count=0, change_batch=None):
        self.name, self.probability, self.count = name, probability, 1 + count
        self._change, self._change_batch = change, change_batch or change

    def __call__(self, planes, numbers):
        def changed():
            return tf.cast(self._change(tf.cast(planes, tf.float32), numbers[1:]), planes.dtype)

        return tf.cond(numbers[0] < self.probability, changed, lambda: planes)

    def of_batch(self, planes, numbers):
        """As a call, of planes (3, B, H, W) and what was drawn for each image, (B, count)."""
        numbers = [column[:, None, None] for column in tf.unstack(numbers, axis=1)]
        changed = tf.cast(self._change_batch(tf.cast(planes, tf.float32), numbers[1:]), planes.dtype)
        return tf.where(numbers[0] < self.probability, changed, planes)


def random_jitter(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, probability=1.0):
    """torchvision's ColorJitter, all or nothing: each strength that is not 0 adds an adjustment, in any order.

    Factors come from [max(0, 1 - strength), 1 + strength], the turn of the hue from [-hue, hue].
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    names = [name for name, strength in strengths.items() if strength]
    if not names:
        return Stage("jitter", 0.0, lambda planes, _: planes)
    middle = {name: 0.0 if name == "hue" else 1.0 for name in names}
    low = tf.constant([max(middle[n] - strengths[n], -0.5 if n == "hue" else 0.0) for n in names])
    span = tf.constant([middle[n] + strengths[n] for n in names]) - low
    orders = tf.constant(list(itertools.permutations(range(len(names)))))

    def order_of(number):
        return tf.gather(orders, tf.cast(number * orders.shape[0], tf.int32))

    def change(planes, numbers):
        return jitter(planes, names, low + span * numbers[:-1], order_of(numbers[-1]))

    def change_batch(planes, numbers):
        order = order_of(numbers[-1])    # (B, 1, 1, n)
        for place in range(len(names)):
            before = planes
            for k, name in enumerate(names):
                adjusted = JITTERS[name](before, low[k] + span[k] * numbers[k])
                planes = tf.where(order[..., place] == k, adjusted, planes)
        return planes

    return Stage("jitter", probability, change, len(names) + 1, change_batch)


def random_grayscale(probability):
    return Stage("grayscale", probability, lambda planes, _: grayscale(planes))


def random_flip(probability):
    return Stage("flip", probability, lambda planes, _: flip(planes))


def random_solarize(probability):
    return Stage("solarize", probability, lambda planes, _: solarize(planes))


def random_blur(sigma, probability=1.0):
    """Pillow's Gaussian blur, `sigma` (least, most) in pixels of the view, below `MAX_SIGMA`."""
    if not 0.0 < sigma[0] <= sigma[1] < MAX_SIGMA:
        raise UsageError(f"The blur is built for 0 < sigma < {MAX_SIGMA:.2f} pixels. Received: sigma {sigma}.")
    return Stage("blur", probability,
                 lambda planes, numbers: blur(planes, sigma[0] + (sigma[1] - sigma[0]) * numbers[0]), 1)


# --- normalisation: the first op of the training step, or the last stage of a view ---


def normalize(images, mean, std, dtype=tf.float32):
    """(B, H, W, C) uint8 -> the same shape in `dtype`, (x / 255 - mean) / std, computed in float32.

    One multiply-add on rows of W * C numbers, because a broadcast over a last axis of 3 is slower.

    Args:
        mean, std: a number for each channel, on [0, 1].
    """
    batch, height, width, channels = images.shape
    scale, shift = (tf.tile(numbers, [width]) for numbers in _scale_and_shift(mean, std))
    rows = tf.reshape(tf.cast(images, tf.float32), [-1, height, width * channels])
    return tf.cast(tf.reshape(rows * scale + shift, [-1 if batch is None else batch, height, width, channels]), dtype)


def normalize_planes(planes, mean, std):
    """As `normalize`, of planes (C, H, W), which keep their place and dtype."""
    scale, shift = (tf.constant(numbers)[:, None, None] for numbers in _scale_and_shift(mean, std))
    return planes * scale + shift


def _scale_and_shift(mean, std):
    return [1.0 / (255.0 * s) for s in std], [-m / s for m, s in zip(mean, std)]
