"""IM by algebra on images of one value each, its draws by their distributions, written anew in NumPy."""

import inspect

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.views import image_mixture, mixture, ops
from moco_tf.views.image_mixture import MIXTURES


def flat(*values, height=8, width=8, channels=3):
    """A view of each value, named by its place."""
    return {str(i): tf.fill([height, width, channels], float(value)) for i, value in enumerate(values)}


def seeds(count):
    return tf.stack([tf.range(count), 3 * tf.ones([count], tf.int32)], 1)


def no_partner(views):
    return None


def always(*values):
    """Partners with views of these values, or all of the one."""
    def partner_of(views):
        others = {name: tf.fill(view.shape, tf.cast(value, view.dtype))
                  for (name, view), value in zip(views.items(), values * len(views))}
        return lambda seed: others
    return partner_of


def any_value(low, high):
    """Partners with views of one value, which the seed draws."""
    def partner_of(views):
        def partner(seed):
            value = low + (high - low) * ops.uniform(seed, [])
            return {name: tf.fill(view.shape, value) for name, view in views.items()}
        return partner
    return partner_of


def over_seeds(mix, views, partner_of, count):
    """{name: (count, H, W, C)}."""
    @tf.function
    def all_of(seeds):
        return tf.map_fn(lambda seed: mix.stage(views, seed, partner_of(views)), seeds, fn_output_signature={
            name: tf.TensorSpec(view.shape, view.dtype) for name, view in views.items()})
    return {name: drawn.numpy() for name, drawn in all_of(seeds(count)).items()}


def numpy_beta_box(random, height, width, count):
    """The spec's box(lam), lam of Beta(1, 1)."""
    share = np.sqrt(1.0 - random.random(count))
    h, w = (np.floor(side * share).astype(int) for side in (height, width))
    row, column = random.integers(0, height, count), random.integers(0, width, count)
    return (np.maximum(0, row - h // 2), np.minimum(height, row + h // 2),
            np.maximum(0, column - w // 2), np.minimum(width, column + w // 2))


def area(box):
    top, bottom, left, right = (np.asarray(edge, np.float64) for edge in box)
    return (bottom - top) * (right - left)


# --- boxes ---


@pytest.mark.parametrize("height, width", [(16, 16), (31, 20), (7, 40)])
def test_a_box_reaches_half_of_each_side_down_and_up(height, width):
    for ratio in (0.0, 0.1, 0.36, 0.5, 0.81, 0.99, 1.0):
        for row in (0, height // 3, height - 1):
            for column in (0, width // 2, width - 1):
                numbers = tf.constant([(row + 0.5) / height, (column + 0.5) / width])
                box = [int(edge) for edge in image_mixture.mixture_box(numbers, tf.constant(ratio), height, width)]
                share = np.sqrt(1.0 - np.float32(ratio), dtype=np.float32)
                h, w = int(np.float32(height) * share), int(np.float32(width) * share)
                assert box == [max(0, row - h // 2), min(height, row + h // 2),
                               max(0, column - w // 2), min(width, column + w // 2)]


@pytest.mark.parametrize("side, published", [(224, 0.317), (32, 0.299)])
def test_mean_area_that_is_pasted(side, published):
    """The mean over 200,000 draws, and its quantiles against NumPy's."""
    numbers = ops.uniform(tf.constant([side, 2]), [4, 200_000])
    ratio = mixture.beta(numbers[:2], 1.0)
    ours = area(image_mixture.mixture_box(numbers[2:], ratio, side, side)) / side ** 2
    theirs = area(numpy_beta_box(np.random.default_rng(0), side, side, 200_000)) / side ** 2
    np.testing.assert_allclose(ours.mean(), published, atol=0.002)
    np.testing.assert_allclose(np.quantile(ours, [0.1, 0.5, 0.9]), np.quantile(theirs, [0.1, 0.5, 0.9]), atol=0.005)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("mask_size", [6, 5])
def test_cutout_boxes_are_everywhere_they_may_be(mask_size, inside):
    """Of all places for the middle each as often: from 0, or from half a mask, one more of them for an even mask."""
    height, width, count = 20, 12, 40_000
    numbers = ops.uniform(tf.constant([mask_size, 1]), [2, count])
    box = image_mixture.cutout_box(numbers, mask_size, inside, height, width)
    top, bottom, left, right = (edge.numpy() for edge in box)
    half, extra = mask_size // 2, (mask_size + 1) % 2
    for low, high, side in ((top, bottom, height), (left, right, width)):
        first, last = (half, side + extra - half) if inside else (0, side + extra)
        expected = [(max(0, middle - half), min(side, middle - half + mask_size)) for middle in range(first, last)]
        places, counts = np.unique(np.stack([low, high], 1), axis=0, return_counts=True)
        share = {tuple(place): 0.0 for place in places}
        for place in expected:
            share[place] += 1.0 / len(expected)
        for place, times in zip(places, counts):
            assert abs(times / count - share[tuple(place)]) < 0.01
        if inside:
            assert set(high - low) == {mask_size}


def test_a_mask_larger_than_the_image_covers_it():
    box = image_mixture.cutout_box(tf.constant([0.3, 0.9]), 50, True, 8, 8)
    assert [int(edge) for edge in box] == [0, 8, 0, 8]


def test_erasing_boxes_have_the_spec_distribution():
    """Against a loop in NumPy: quantiles of area, of height / width, and where boxes begin."""
    side, tries, least, most, r = 32, 20, 0.02, 0.4, 0.3
    random, reference = np.random.default_rng(1), []
    while len(reference) < 20_000:
        for _ in range(tries):
            size, aspect = random.uniform(least, most) * side * side, random.uniform(r, 1 / r)
            h, w = int(np.sqrt(size * aspect)), int(np.sqrt(size / aspect))
            if h < side and w < side:
                reference.append((h, w, random.integers(0, side - h + 1), random.integers(0, side - w + 1)))
                break
    numbers = ops.uniform(tf.constant([1, 2]), [20_000, 2 + 2 * tries])
    boxes = tf.function(lambda all_of: tf.map_fn(
        lambda one: tf.stack(image_mixture.erasing_box(one, (least, most), r, side, side)), all_of,
        fn_output_signature=tf.int32))(numbers).numpy()
    top, bottom, left, right = boxes.T
    ours, reference, levels = np.stack([bottom - top, right - left, top, left], 1), np.array(reference), (0.1, 0.5, 0.9)
    for mine, theirs in zip(ours.T, reference.T):
        np.testing.assert_allclose(np.quantile(mine, levels), np.quantile(theirs, levels), atol=1.01)
        np.testing.assert_allclose(mine.mean(), theirs.mean(), rtol=0.02)
    aspects = [np.mean(drawn[:, 0] / drawn[:, 1]) for drawn in (ours, reference)]
    np.testing.assert_allclose(*aspects, rtol=0.02)


def test_no_box_where_none_fits():
    box = image_mixture.erasing_box(ops.uniform(tf.constant([1, 2]), [42]), (0.02, 0.4), 0.3, 1, 1)
    assert area(box) == 0


# --- mixtures ---


@pytest.mark.parametrize("name, options, untouched", [
    ("global", {}, 0.81), ("region", {}, 0.81), ("im", {}, 0.6561), ("global", dict(g_num=1, g_prob=0.3), 0.7),
    ("region", dict(r_num=3, r_prob=0.2), 0.512), ("im", dict(g_prob=0.0), 0.81), ("region", dict(r_beta=0.0), 1.0),
    ("im", dict(g_num=0, r_num=0), 1.0), ("cutout", dict(mask_size=3), 0.9), ("random_erasing", {}, 0.9)])
def test_share_of_samples_that_stay(name, options, untouched):
    """A region may be of no pixel: where 1 - lambda is below (2 / 64)^2, a thousandth of the rounds."""
    drawn = over_seeds(MIXTURES[name](**options), flat(-1.0, height=64, width=64, channels=1), always(5.0), 4000)["0"]
    same = np.all(drawn == -1.0, axis=(1, 2, 3))
    assert abs(same.mean() - untouched) <= 4 * np.sqrt(untouched * (1 - untouched) / 4000) + 1e-3 * (untouched < 1)


def test_global_mixture_of_one_round_is_uniform_between_the_two():
    """lambda of Beta(1, 1), and never max(lambda, 1 - lambda)."""
    drawn = over_seeds(MIXTURES["global"](g_num=1, g_prob=1.0), flat(0.0, height=2, width=2), always(1.0), 4000)["0"]
    assert np.all(drawn == drawn[:, :1, :1, :1])
    np.testing.assert_allclose(np.quantile(drawn[:, 0, 0, 0], [0.1, 0.3, 0.5, 0.7, 0.9]), [0.1, 0.3, 0.5, 0.7, 0.9],
                               atol=0.03)


def test_two_rounds_blend_twice():
    """Of x = 0 and partners 1: lambda_1 lambda_2 is left, whose mean is 1/4 and whose mean square 1/9."""
    drawn = over_seeds(MIXTURES["global"](g_prob=1.0), flat(0.0, height=2, width=2), always(1.0), 8000)["0"][:, 0, 0, 0]
    np.testing.assert_allclose([np.mean(1 - drawn), np.mean((1 - drawn) ** 2)], [1 / 4, 1 / 9], atol=0.01)


def test_region_mixture_pastes_a_rectangle_as_it_is():
    """Beside the share of a box of the spec, measured in NumPy."""
    mix = MIXTURES["region"](r_num=1, r_prob=1.0)
    drawn = over_seeds(mix, flat(0.0, height=20, width=12, channels=2), always(7.0), 4000)["0"]
    assert set(np.unique(drawn)) == {0.0, 7.0}
    pasted = drawn[..., 0] == 7.0
    np.testing.assert_array_equal(pasted, drawn[..., 1] == 7.0)
    np.testing.assert_array_equal(pasted.sum((1, 2)), pasted.any(2).sum(1) * pasted.any(1).sum(1))
    expected = area(numpy_beta_box(np.random.default_rng(0), 20, 12, 100_000)).mean() / 240
    np.testing.assert_allclose(pasted.mean(), expected, atol=0.012)
    corner, middle = pasted[:, 0, 0].mean(), pasted[:, 10, 6].mean()
    assert 0.05 < corner < middle


def test_pixel_decay_acts_in_the_first_round_only():
    views = flat(1.0, height=8, width=8, channels=1)
    twice = over_seeds(MIXTURES["region"](r_num=2, r_prob=0.5, r_pixel_decay=0.5), views, always(9.0), 2000)["0"]
    values = [set(np.unique(image)) for image in twice]
    left = [min(found) for found in values]     # 0.5 where round 0 came off, 1 where it did not, or all is pasted over
    assert set(left) <= {0.5, 1.0, 9.0}
    assert abs(np.mean(np.array(left) == 0.5) - 0.5) < 0.06


def test_partners_of_regions_have_passed_through_the_global_mixture():
    """Samples are 0, partners 1, and what is pasted into a region is never blended with a sample: it is of partners."""
    values = []
    mix = MIXTURES["im"](g_num=1, g_prob=1.0, r_num=1, r_prob=1.0)
    drawn = over_seeds(mix, flat(0.0, height=16, width=16, channels=1), any_value(10.0, 20.0), 800)["0"]
    for image in drawn:
        found, counts = np.unique(image, return_counts=True)
        assert len(found) <= 2
        values.append(found[-1] if len(found) == 2 else np.nan)
    pasted = np.array([value for value in values if value >= 10.0])
    assert len(pasted) > 500
    # lambda a + (1 - lambda) b of a and b uniform on [10, 20]: variance (100 / 12) (2 / 3); of a alone it is 100 / 12.
    np.testing.assert_allclose(pasted.mean(), 15.0, atol=0.5)
    np.testing.assert_allclose(pasted.var(), 100 / 18, rtol=0.15)


@pytest.mark.parametrize("name, options", [
    ("im", dict(g_prob=0.5, r_prob=0.5)), ("cutout", dict(mask_size=4, cutout_p=0.7, mask_color=2.0)),
    ("random_erasing", dict(random_erasing_prob=0.7))])
def test_views_of_a_sample_share_what_is_drawn(name, options):
    """Two views of the values 0 and 1 of one partner, 2 and 3: their difference stays 1, unless both are filled."""
    drawn = over_seeds(MIXTURES[name](**options), flat(0.0, 1.0), always(2.0, 3.0), 200)
    difference = drawn["1"] - drawn["0"]
    if name == "im":
        np.testing.assert_allclose(difference, 1.0, atol=1e-6)
    else:
        filled = difference == 0.0
        assert np.all(filled | (difference == 1.0)) and filled.any()
        np.testing.assert_array_equal(drawn["0"][filled], drawn["1"][filled])
    assert any(len(np.unique(image)) > 1 for image in drawn["0"])


def test_random_erasing_fills_with_one_number():
    mix = MIXTURES["random_erasing"](random_erasing_prob=1.0)
    drawn = over_seeds(mix, flat(-1.0, height=24, width=24), no_partner, 500)["0"]
    filled = [np.unique(image[image != -1.0]) for image in drawn]
    assert all(len(values) == 1 for values in filled)
    np.testing.assert_allclose(np.quantile(np.concatenate(filled), [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.07)


def test_cutout_fills_with_its_colour():
    mix = MIXTURES["cutout"](mask_size=4, cutout_p=1.0, cutout_inside=True, mask_color=0.25)
    drawn = over_seeds(mix, flat(-1.0), no_partner, 50)["0"]
    np.testing.assert_array_equal((drawn == 0.25).sum((1, 2)), 16)
    np.testing.assert_array_equal((drawn == -1.0).sum((1, 2)), 64 - 16)


def test_levels_stay_levels():
    views = {"query": tf.fill([8, 8, 3], tf.constant(10, tf.uint8))}
    drawn = over_seeds(MIXTURES["im"](g_prob=0.5, r_prob=0.5), views, always(200), 50)["query"]
    assert drawn.dtype == np.uint8 and drawn.min() == 10 and drawn.max() == 200 and len(np.unique(drawn)) > 10


def test_a_partner_is_loaded_only_where_a_round_comes_off():
    loads = []

    def partner_of(views):
        def load():
            loads.append(1)
            return np.ones((2, 2, 3), np.float32)
        return lambda seed: {"0": tf.ensure_shape(tf.numpy_function(load, [], tf.float32), [2, 2, 3])}

    over_seeds(MIXTURES["global"](), flat(0.0, height=2, width=2), partner_of, 1000)
    assert 140 < len(loads) < 260      # 2 rounds of a tenth: 200 expected, deviation 13
    loads.clear()
    over_seeds(MIXTURES["im"](), flat(0.0, height=2, width=2), partner_of, 1000)
    assert 350 < len(loads) < 530      # 0.2 + 0.2 (1 + 0.2) each: 440


def test_draws_depend_on_the_seed_alone_with_and_without_xla():
    mix, views = MIXTURES["im"](g_prob=0.5, r_prob=0.5), flat(0.0, 3.0)
    partner = any_value(5.0, 9.0)(views)
    compiled = tf.function(lambda seed: mix.stage(views, seed, partner), jit_compile=True)
    drawn = [mix.stage(views, seed, partner)["1"] for seed in seeds(20)]
    for seed, image in zip(seeds(20), drawn):
        np.testing.assert_allclose(compiled(seed)["1"], image, atol=1e-5)
    assert len({float(tf.reduce_sum(image)) for image in drawn}) > 15


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UsageError, match="partners must be one of data, batch. Received: 'stream'"):
        MIXTURES["region"](partners="stream")
    with pytest.raises(UsageError, match="g_alpha must be above 0. Received: 0.0"):
        MIXTURES["im"](g_alpha=0.0)


def test_defaults_are_the_papers():
    """The options of the fork's train_CMC.py."""
    defaults = {name: {key: p.default for key, p in inspect.signature(make).parameters.items()}
                for name, make in MIXTURES.items()}
    whole, region = dict(g_alpha=1.0, g_num=2, g_prob=0.1), dict(r_beta=1.0, r_num=2, r_prob=0.1, r_pixel_decay=1.0)
    assert defaults == {
        "im": {**whole, **region, "partners": "data"}, "global": {**whole, "partners": "data"},
        "region": {**region, "partners": "data"},
        "cutout": dict(mask_size=50, cutout_p=0.1, cutout_inside=False, mask_color=0.0),
        "random_erasing": dict(random_erasing_prob=0.1, area_ratio_range=(0.02, 0.4), min_aspect_ratio=0.3,
                               max_attempt=20)}
