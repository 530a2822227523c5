"""Batches mixed and erased on the device, after normalisation, as DeiT trains (arXiv:2012.12877, table 9).

    images = random_erasing(images, seeds[0])
    images, targets = mixture(images, labels, seeds[1], num_classes=1000)

What is drawn and what is done with it are functions of their own; all shapes are static. A *ratio* is the share of an
image in its own mixture, lambda in the papers. A *box* is (top, bottom, left, right), int32, bottom and right outside.
"""

import math

import tensorflow as tf

from moco_tf.losses import at_least_float32
from moco_tf.views import ops


# --- what is done ---


def smooth(labels, num_classes, smoothing):
    """(N,) integers -> targets (N, num_classes), float32 rows of sum 1 (arXiv:1512.00567, sec. 7)."""
    off = smoothing / num_classes
    return tf.one_hot(labels, num_classes, on_value=1.0 - smoothing + off, off_value=off)


def mix(rows, ratio):
    """`ratio` of each row of a batch and 1 - ratio of its partner, the row in its place in the reversed batch
    (mixup, arXiv:1710.09412). For images and for targets."""
    rows = at_least_float32(rows)
    ratio = tf.cast(ratio, rows.dtype)
    return ratio * rows + (1.0 - ratio) * tf.reverse(rows, [0])


def paste(images, box):
    """The box of each image's partner in its place (CutMix, arXiv:1905.04899)."""
    _, height, width, _ = images.shape
    return tf.where(inside(box, height, width)[..., None], tf.reverse(images, [0]), images)


def erase(images, boxes, noise):
    """The noise in the place of each image's box; boxes of (N,) numbers, or one for all (arXiv:1708.04896)."""
    _, height, width, _ = images.shape
    return tf.where(inside(boxes, height, width)[..., None], tf.cast(noise, images.dtype), images)


def inside(box, height, width):
    """Whether a pixel lies in the box: (..., H, W)."""
    top, bottom, left, right = (edge[..., None, None] for edge in box)
    row, column = tf.range(height)[:, None], tf.range(width)
    return (row >= top) & (row < bottom) & (column >= left) & (column < right)


def ratio_of(box, height, width):
    """The share of an image outside of the box, float32."""
    top, bottom, left, right = box
    return 1.0 - tf.cast((bottom - top) * (right - left), tf.float32) / (height * width)


# --- what is drawn ---


def beta(numbers, alpha):
    """Beta(alpha, alpha) from two uniform numbers in [0, 1), without rejection.

    It is 1/2 + t / (2 sqrt(2 alpha + t^2)) for t of Student's distribution with 2 alpha degrees of freedom, which has a
    polar form like Box and Muller's (Bailey, Polar Generation of Random Variates with the t-Distribution, 1994).
    `tf.random.stateless_gamma` does not compile with XLA.
    """
    power = tf.pow(1.0 - numbers[0], 1.0 / alpha)
    cosine = tf.cos(2.0 * math.pi * numbers[1])
    return 0.5 + 0.5 * cosine * tf.sqrt(1.0 - power) / tf.sqrt(power + (1.0 - power) * cosine * cosine)


def cut_sides(ratio, height, width):
    """Height and width of a box of the image's form outside of which lies `ratio` of the image."""
    share = tf.sqrt(1.0 - ratio)
    return tf.cast(share * height, tf.int32), tf.cast(share * width, tf.int32)


def box_round(row, column, sides, height, width):
    """The box of these sides with its middle on a pixel, cut at the edges of the image."""
    top, left = row - sides[0] // 2, column - sides[1] // 2
    edges = [(top, height), (top + sides[0], height), (left, width), (left + sides[1], width)]
    return tuple(tf.clip_by_value(edge, 0, limit) for edge, limit in edges)


def erasing_box(numbers, height, width, area, aspect):
    """Boxes to erase: the first of ten tries that is smaller than the image both ways, or an empty one.

    Args:
        numbers: (..., 22) uniform in [0, 1): ten tries of area and aspect, then the position.
        area: (least, most), as a fraction of the image's.
        aspect: (least, most) width / height, drawn uniformly on a log scale.
    """
    heights, widths = ops.sides_of(ops.tries_of(numbers), float(height), float(width), area, aspect)
    fits = (heights < height) & (widths < width)
    box_height, box_width = ops.first_fit(fits, heights, 0.0), ops.first_fit(fits, widths, 0.0)
    top = tf.floor(numbers[..., 20] * (height - box_height + 1.0))
    left = tf.floor(numbers[..., 21] * (width - box_width + 1.0))
    return tuple(tf.cast(edge, tf.int32) for edge in (top, top + box_height, left, left + box_width))


# --- both ---


def mixture(images, labels, seed, num_classes, mixup=0.8, cutmix=1.0, switch=0.5, smoothing=0.1):
    """A batch mixed with itself reversed, by one ratio: mixup or CutMix, chosen for the batch.

    Args:
        images: (N, H, W, C), normalised; N even, unless `mixup` and `cutmix` are 0.
        labels: (N,) integers.
        seed: (2,) int32.
        num_classes: length of a target.
        mixup, cutmix: alpha of the ratio's distribution, Beta(alpha, alpha); 0: never this one.
        switch: probability of CutMix where both may be.
        smoothing: of the targets, in the image's own and in its partner's.

    Returns:
        images of the same shape and dtype, and targets (N, num_classes) float32. With both alphas 0 the images are
        untouched and the targets only smoothed.

    Raises:
        ValueError: while tracing, for an odd batch.
    """
    targets = smooth(labels, num_classes, smoothing)
    if not mixup and not cutmix:
        return images, targets
    batch, height, width, _ = images.shape
    if batch % 2:
        raise ValueError("Mixup and CutMix pair the images of a batch, so a replica's batch must be even. Received: "
                         f"{batch} images. Use an even batch size per replica, or set mixup and cutmix to 0.")
    numbers = ops.uniform(seed, [5])

    def whole():
        ratio = beta(numbers[1:3], mixup)
        return tf.cast(mix(images, ratio), images.dtype), ratio

    def part():
        row, column = (tf.cast(numbers[3 + i] * side, tf.int32) for i, side in enumerate((height, width)))
        box = box_round(row, column, cut_sides(beta(numbers[1:3], cutmix), height, width), height, width)
        return paste(images, box), ratio_of(box, height, width)

    if mixup and cutmix:
        images, ratio = tf.cond(numbers[0] < switch, part, whole)
    else:
        images, ratio = part() if cutmix else whole()
    return images, mix(targets, ratio)


def random_erasing(images, seed, probability=0.25, area=(0.02, 1 / 3), aspect=0.3):
    """Fills one box of some images with noise, a standard normal number for each pixel and channel.

    Args:
        images: (N, H, W, C), normalised.
        seed: (2,) int32.
        probability: that an image is drawn; its box may still be none, see `erasing_box`.
        area: (least, most) area of the box, as a fraction of the image's.
        aspect: least width / height; the most is its reciprocal.
    """
    batch, height, width, _ = images.shape
    draws, noise = tf.unstack(ops.split(seed, 2))
    numbers = ops.uniform(draws, [batch, 23])
    box = erasing_box(numbers[:, 1:], height, width, area, (aspect, 1.0 / aspect))
    box = tuple(tf.where(numbers[:, 0] < probability, edge, 0) for edge in box)
    return erase(images, box, ops.normal(noise, images.shape))
