"""IM: samples mixed with other samples, or with holes, as the last stage of their views (image mixture's first version,
of March 2020: github.com/szq0214/CMC_with_Image_Mixture). Labels, indices and the loss stay what they are.

    mix = MIXTURES["im"](g_prob=0.1).stage
    views = mix(views, seed, partner)

`views` are those of one sample, {name: (H, W, C)}, all of one shape: they share whatever is drawn. They come
normalised, float32; uint8 levels, to show what happens, are mixed and rounded. `partner`, a function seed -> views,
gives those of another sample. All that is drawn is a function of the seed.
"""

from typing import Callable, NamedTuple, Optional

import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.views import mixture, ops

PARTNERS = ("data", "batch")


class ImageMixture(NamedTuple):
    """A stage, (views, seed, partner) -> views, where its partners come from, and which it asks for.

    "data": any image of the source, itself too, loaded and augmented afresh. "batch": any row of the host's batch,
    itself too; of a source that is read as a stream there are no others. "": it has none.

    `asked`, seed -> (seeds (A, 2), which (A,) bool): the seeds with which the stage may call `partner`, and with which
    it does, so that the partners of a whole batch can be made beforehand, in one call. None: there are no partners.
    """

    stage: Callable
    partners: str = ""
    asked: Optional[Callable] = None


# --- what is done ---


def blend(views, others, ratio):
    """`ratio` of the views and 1 - ratio of the others."""
    return _each(lambda view, other: ratio * view + (1.0 - ratio) * other, views, others)


def paste(views, others, box):
    """The box of the others in its place; boxes are those of `mixture`."""
    return _each(lambda view, other: _in_box(box, other, view), views, others)


def fill(views, box, value):
    """One number in place of the box, in all pixels and channels."""
    return _each(lambda view: _in_box(box, tf.fill(view.shape, value), view), views)


def scale(views, factor):
    return _each(lambda view: factor * view, views)


def _each(change, views, *others):
    """`change` of each view and the others of its name, in float32; whole levels stay whole levels."""
    def one(*images):
        changed = change(*(tf.cast(image, tf.float32) for image in images))
        return tf.cast(ops.nearest(changed) if images[0].dtype == tf.uint8 else changed, images[0].dtype)

    return {name: one(view, *(other[name] for other in others)) for name, view in views.items()}


def _in_box(box, other, view):
    """On rows of W * C numbers, because a broadcast over the channels takes four times as long."""
    height, width, channels = view.shape
    top, bottom, left, right = box
    inside = mixture.inside((top, bottom, channels * left, channels * right), height, channels * width)
    rows = (tf.reshape(image, [height, channels * width]) for image in (other, view))
    return tf.reshape(tf.where(inside, *rows), view.shape)


def _sides(views):
    """H and W."""
    return next(iter(views.values())).shape[:2]


# --- what is drawn ---


def mixture_box(numbers, ratio, height, width):
    """A box that outside the image's edges would leave `ratio` of the image, its middle on any pixel.

    Its sides are rounded down to even numbers, half on each side of the middle.

    Args:
        numbers: (2,) uniform in [0, 1): where.
    """
    row, column = (tf.cast(numbers[i] * side, tf.int32) for i, side in enumerate((height, width)))
    sides = [side // 2 * 2 for side in mixture.cut_sides(ratio, height, width)]
    return mixture.box_round(row, column, sides, height, width)


def cutout_box(numbers, mask_size, inside, height, width):
    """A square of `mask_size`, its middle on any pixel (with an even side, on any edge between two), or with `inside`
    only so that the whole square is in the image; a larger one covers the image.

    Args:
        numbers: (2,) uniform in [0, 1): where.
    """
    margin = mask_size // 2 if inside else 0

    def middle(number, side):
        places = max(1, side + (mask_size + 1) % 2 - 2 * margin)
        return margin + tf.cast(number * places, tf.int32)

    row, column = middle(numbers[0], height), middle(numbers[1], width)
    return mixture.box_round(row, column, (mask_size, mask_size), height, width)


def erasing_box(numbers, area, min_aspect, height, width):
    """The first of several tries that is smaller than the image both ways, or an empty one.

    Args:
        numbers: (2 + 2 tries,) uniform in [0, 1): where, then area and aspect of each try.
        area: (least, most), as a fraction of the image's.
        min_aspect: least height / width, which is drawn uniformly up to its reciprocal.
    """
    tries = tf.reshape(numbers[2:], [-1, 2])
    area = height * width * (area[0] + (area[1] - area[0]) * tries[:, 0])
    aspect = min_aspect + (1.0 / min_aspect - min_aspect) * tries[:, 1]
    heights, widths = tf.floor(tf.sqrt(area * aspect)), tf.floor(tf.sqrt(area / aspect))
    fits = (heights < height) & (widths < width)
    box_height, box_width = (ops.first_fit(fits, sides, 0.0) for sides in (heights, widths))
    top, left = tf.floor(numbers[0] * (height - box_height + 1.0)), tf.floor(numbers[1] * (width - box_width + 1.0))
    return tuple(tf.cast(edge, tf.int32) for edge in (top, top + box_height, left, left + box_width))


# --- both ---


def _require(holds, name, value, must):
    if not holds:
        raise UsageError(f"mixture.{name} must be {must}. Received: {value}.")


def _require_rounds(number_name, number, probability_name, probability):
    _require(isinstance(number, int) and number >= 0, number_name, number, "a whole number, 0 or more")
    _require(0 <= probability <= 1, probability_name, probability, "from 0 to 1")


def im(g_alpha=1.0, g_num=2, g_prob=0.1, r_beta=1.0, r_num=2, r_prob=0.1, r_pixel_decay=1.0, partners="data"):
    """IM: the global mixture, then the region mixture, whose partners have passed through the global one themselves."""
    of_whole, _, asked_by_whole = global_mixture(g_alpha, g_num, g_prob, partners)
    of_region, _, asked_by_region = region_mixture(r_beta, r_num, r_prob, r_pixel_decay, partners)

    def stage(views, seed, partner):
        def mixed_partner(seed):
            drawn, mixed = tf.unstack(ops.split(seed, 2))
            return of_whole(partner(drawn), mixed, partner)

        first, second = tf.unstack(ops.split(seed, 2))
        return of_region(of_whole(views, first, partner), second, mixed_partner)

    def asked(seed):
        first, second = tf.unstack(ops.split(seed, 2))
        seeds, which = asked_by_whole(first)
        for of_partner, pasted in zip(*map(tf.unstack, asked_by_region(second))):
            drawn, mixed = tf.unstack(ops.split(of_partner, 2))
            others, blended = asked_by_whole(mixed)
            seeds = tf.concat([seeds, drawn[None], others], axis=0)
            which = tf.concat([which, pasted[None], pasted & blended], axis=0)
        return seeds, which

    return ImageMixture(stage, _known(partners), asked)


def global_mixture(g_alpha=1.0, g_num=2, g_prob=0.1, partners="data"):
    """Samples blended with others: `g_num` rounds, each with probability `g_prob`, by Beta(g_alpha, g_alpha)."""
    if g_alpha <= 0:
        raise UsageError(f"mixture.g_alpha must be above 0. Received: {g_alpha}. Use g_num=0 for no global mixture.")

    _require_rounds("g_num", g_num, "g_prob", g_prob)

    def mix(_, views, numbers, others):
        return blend(views, others(), mixture.beta(numbers[:2], g_alpha))

    return ImageMixture(_rounds(g_num, g_prob, mix), _known(partners), _asked(g_num, g_prob))


def region_mixture(r_beta=1.0, r_num=2, r_prob=0.1, r_pixel_decay=1.0, partners="data"):
    """Boxes of other samples pasted in: `r_num` rounds, each with probability `r_prob`, a ratio of Beta(r_beta, r_beta)
    left. In the first round the sample is scaled by `r_pixel_decay` before. With `r_beta` 0 nothing is done."""
    _require_rounds("r_num", r_num, "r_prob", r_prob)

    def mix(i, views, numbers, others):
        box = mixture_box(numbers[2:], mixture.beta(numbers[:2], r_beta), *_sides(views))
        if r_pixel_decay != 1.0:
            views = scale(views, tf.where(i == 0, r_pixel_decay, 1.0))
        return paste(views, others(), box)

    rounds = r_num if r_beta > 0 else 0
    return ImageMixture(_rounds(rounds, r_prob, mix), _known(partners), _asked(rounds, r_prob))


def cutout(mask_size=50, cutout_p=0.1, cutout_inside=False, mask_color=0.0):
    """Cutout (arXiv:1708.04552): with probability `cutout_p` a square of `mask_color`; 0 is the mean colour."""
    _require(0 <= cutout_p <= 1, "cutout_p", cutout_p, "from 0 to 1")
    _require(isinstance(mask_size, int) and mask_size > 0, "mask_size", mask_size, "a whole number above 0")

    def stage(views, seed, partner):
        del partner
        numbers = ops.uniform(seed, [3])
        box = cutout_box(numbers[1:], mask_size, cutout_inside, *_sides(views))
        return tf.cond(numbers[0] < cutout_p, lambda: fill(views, box, float(mask_color)), lambda: views)

    return ImageMixture(stage)


def random_erasing(random_erasing_prob=0.1, area_ratio_range=(0.02, 0.4), min_aspect_ratio=0.3, max_attempt=20):
    """Random Erasing as IM has it: with its probability a box of one number in [0, 1). Unlike in
    `mixture.random_erasing` the aspect is uniform, not its logarithm, and the box is not of noise."""
    _require(0 <= random_erasing_prob <= 1, "random_erasing_prob", random_erasing_prob, "from 0 to 1")
    _require(isinstance(area_ratio_range, tuple) and len(area_ratio_range) == 2
             and 0 < area_ratio_range[0] <= area_ratio_range[1] <= 1, "area_ratio_range", area_ratio_range,
             "(least, most) of the image's area, above 0 and up to 1")
    _require(0 < min_aspect_ratio <= 1, "min_aspect_ratio", min_aspect_ratio, "above 0 and up to 1")
    _require(isinstance(max_attempt, int) and max_attempt > 0, "max_attempt", max_attempt, "a whole number above 0")

    def stage(views, seed, partner):
        del partner
        numbers = ops.uniform(seed, [4 + 2 * max_attempt])
        box = erasing_box(numbers[2:], area_ratio_range, min_aspect_ratio, *_sides(views))
        return tf.cond(numbers[0] < random_erasing_prob, lambda: fill(views, box, numbers[1]), lambda: views)

    return ImageMixture(stage)


def _rounds(count, probability, mix):
    """A stage of `count` rounds, each `mix(round, views, numbers (4,), others)` with that probability.

    `others()` are the partner's views. A loop of branches, so that partners are loaded only where a round comes off,
    and the graph to load one is there once.
    """
    def stage(views, seed, partner):
        if not count:
            return views
        numbers, seeds = _drawn(seed, count)

        def one(i, views):
            ours = numbers[i]    # not numbers[i, 1:] below: of a position that varies XLA slices the wrong part
            return i + 1, tf.cond(
                ours[0] < probability, lambda: mix(i, views, ours[1:], lambda: partner(seeds[i])), lambda: views)

        return tf.while_loop(lambda i, _: i < count, one, (0, views))[1]

    return stage


def _asked(count, probability):
    """Which partners `_rounds` asks for."""
    def asked(seed):
        numbers, seeds = _drawn(seed, count)
        return seeds, numbers[:, 0] < probability

    return asked


def _drawn(seed, count):
    """Of so many rounds the numbers, (count, 5), and the seeds of the partners, (count, 2)."""
    drawn, others = tf.unstack(ops.split(seed, 2))
    return ops.uniform(drawn, [count, 5]), ops.split(others, count)


def _known(partners):
    if partners not in PARTNERS:
        raise UsageError(f"mixture.partners must be one of {', '.join(PARTNERS)}. Received: {partners!r}.")
    return partners


MIXTURES = {
    "im": im, "global": global_mixture, "region": region_mixture, "cutout": cutout, "random_erasing": random_erasing,
}
