"""The recipes are the papers', reproducible, and the same by every route."""

import time

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.errors import UsageError
from moco_tf.views import colour, ops, randaugment
from moco_tf.views.recipes import RECIPES


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def seeds(count):
    return tf.stack([tf.range(count), 7 * tf.range(count)], 1)


JITTER_V2 = ("random_jitter", 0.4, 0.4, 0.4, 0.1, 0.8)
JITTER_V3 = ("random_jitter", 0.4, 0.4, 0.2, 0.1, 0.8)
PAPERS = {    # of each view, or of both alike: crop, then stages in order with their probabilities
    "moco_v1": [("random_crop", (0.2, 1.0)), ("random_grayscale", 0.2), ("random_jitter", 0.4, 0.4, 0.4, 0.4),
                ("random_flip", 0.5)],
    "moco_v2": [("random_crop", (0.2, 1.0)), JITTER_V2, ("random_grayscale", 0.2), ("random_blur", (0.1, 2.0), 0.5),
                ("random_flip", 0.5)],
    "insdis": [("random_crop", (0.2, 1.0)), ("random_grayscale", 0.2), ("random_jitter", 0.4, 0.4, 0.4, 0.4),
               ("random_flip", 0.5)],
    "insdis_cifar": [("random_crop", (0.2, 1.0)), ("random_jitter", 0.4, 0.4, 0.4, 0.4), ("random_grayscale", 0.2)],
    "cifar": [("random_crop", (0.08, 1.0)), ("random_flip", 0.5), JITTER_V2, ("random_grayscale", 0.2)],
    "moco_v3": {
        "view_1": [("random_crop", (0.08, 1.0)), JITTER_V3, ("random_grayscale", 0.2), ("random_blur", (0.1, 2.0), 1.0),
                   ("random_flip", 0.5)],
        "view_2": [("random_crop", (0.08, 1.0)), JITTER_V3, ("random_grayscale", 0.2), ("random_blur", (0.1, 2.0), 0.1),
                   ("random_solarize", 0.2), ("random_flip", 0.5)]},
    "cmc": [("random_crop", (0.2, 1.0)), ("random_flip", 0.5)],
    "train_linear": [("random_crop", (0.08, 1.0)), ("random_flip", 0.5)],
    "transfer": [("random_crop", (0.05, 1.0)), ("random_flip", 0.5)],
    "deit": [("random_crop", (0.08, 1.0)), ("random_flip", 0.5), ("RandAugment", 2, 0.5, 9.0, 0.5, (124, 116, 104))],
    "eval": [("central_crop", 256)],
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipe_is_the_papers(monkeypatch, name):
    def record(kind, module=ops):
        def make(*args, **kwargs):
            args = args[1:] if kind.endswith("crop") else args      # not the size
            return kind, *args, *kwargs.values()
        monkeypatch.setattr(module, kind, make)

    for kind in ("random_crop", "central_crop", "random_grayscale", "random_jitter", "random_blur", "random_solarize",
                 "random_flip"):
        record(kind)
    record("RandAugment", randaugment)
    for view_name, view in RECIPES[name](size=224).views.items():
        paper = PAPERS[name] if isinstance(PAPERS[name], list) else PAPERS[name][view_name]
        assert [view.crop, *view.stages] == paper
        assert view.interpolation == ("bicubic" if name == "deit" else "bilinear")


@pytest.mark.parametrize("name, views", [
    ("moco_v1", {"query", "key"}), ("moco_v2", {"query", "key"}), ("cifar", {"query", "key"}),
    ("quickstart", {"query", "key"}), ("moco_v3", {"view_1", "view_2"}), ("insdis", {"query"}),
    ("insdis_cifar", {"query"}),
    ("train_linear", {"image"}), ("transfer", {"image"}), ("deit", {"image"}), ("eval", {"image"})])
def test_views_have_names_shapes_and_constants(name, views):
    recipe = RECIPES[name](size=16)
    drawn = recipe.apply(tf.constant(noise(20, 33, 3)), tf.constant([1, 2]))
    assert set(drawn) == set(recipe.views) == views
    assert all(view.shape == (16, 16, 3) and view.dtype == tf.uint8 for view in drawn.values())
    assert len(recipe.mean) == len(recipe.std) == 3 and recipe.space is None


@pytest.mark.parametrize("name, grey, jittered, flipped", [
    ("moco_v1", 0.2, 0.9875, 0.5), ("moco_v2", 0.2, 0.79, 0.5), ("cifar", 0.2, 0.79, 0.5)])
def test_probabilities(name, grey, jittered, flipped):
    """On images where each shows: a colour ramp for grey; even grey, that brightness alone changes; a grey ramp."""
    recipe, count = RECIPES[name](size=8), 1200

    def drawn(image):
        images = tf.tile(image[None].astype(np.uint8), [count, 1, 1, 1])
        return recipe.apply_batch(images, seeds(count))["query"].numpy()

    colour = drawn(np.broadcast_to([200.0, 60.0, 100.0], (12, 12, 3)))
    assert abs(np.mean(np.ptp(colour.astype(int), axis=3).max((1, 2)) == 0) - grey) < 0.06
    even = drawn(np.full((12, 12, 3), 100.0))       # floor(100 f) = 100 for f in [1, 1.01), 1/80 of the range
    assert abs(np.mean(even[:, 0, 0, 0] != 100) - jittered) < 0.06
    ramp = drawn(np.broadcast_to(np.arange(12.0)[None, :, None] * 20, (12, 12, 3)))
    assert abs(np.mean(ramp[:, 4, 7, 0] < ramp[:, 4, 0, 0]) - flipped) < 0.07


@pytest.mark.parametrize("name, xla", [("moco_v2", True), ("moco_v3", True), ("moco_v3", False), ("insdis", True)])
def test_each_stage_draws_from_a_seed_of_its_own(name, xla):
    recipe, count = RECIPES[name](size=16, xla=xla), 3
    drawn = recipe.draw(seeds(count))
    assert list(drawn) == [f"{view}_numbers" for view in recipe.views]
    for i, seed in enumerate(seeds(count)):
        for (key, numbers), view, own in zip(drawn.items(), recipe.views.values(), ops.split(seed, len(recipe.views))):
            each = zip(ops.split(own, len(view.counts)), view.counts)
            np.testing.assert_array_equal(numbers[i], tf.concat([ops.uniform(one, [n]) for one, n in each], 0), key)


@pytest.mark.parametrize("name", ["moco_v3", "deit"])
def test_same_seed_same_pixels_in_any_parallelism(name):
    recipe = RECIPES[name](size=32)
    images = tf.constant(noise(6, 50, 70, 3))

    def drawn(calls):
        data = tf.data.Dataset.range(24).map(
            lambda i: recipe.apply(images[i % 6, :40 + i, :], tf.cast(tf.stack([i, 5]), tf.int32)),
            num_parallel_calls=calls)
        return list(data.as_numpy_iterator())

    one, four = drawn(1), drawn(4)
    for first, second in zip(one, four):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name])
    drawn_first, drawn_later = list(one[0].values()), list(one[6].values())      # of the same image
    assert len(drawn_first) == 1 or np.any(drawn_first[0] != drawn_first[1])
    assert np.any(drawn_first[0] != drawn_later[0])


@pytest.mark.parametrize("name", ["moco_v2", "quickstart", "deit"])
def test_batches_and_plain_tensorflow_draw_the_same_views(name):
    """The same numbers by other sums: at a rounding edge a level, rarely more after an amplifying adjustment."""
    count, images = 12, tf.constant(noise(12, 28, 28, 3))
    recipe, plain = RECIPES[name](size=28), RECIPES[name](size=28, xla=False)
    batch = recipe.apply_batch(images, seeds(count))
    for apply in (tf.function(recipe.apply), tf.function(plain.apply)):
        for view in batch:
            each = np.stack([apply(images[i], seeds(count)[i])[view] for i in range(count)])
            differences = np.abs(each.astype(int) - batch[view].numpy())
            assert differences.max() <= 4 and np.mean(differences > 0) < 0.01
    plain_batch = plain.apply_batch(images, seeds(count))
    for view in batch:
        assert np.mean(batch[view] != plain_batch[view]) < 0.01


@pytest.mark.parametrize("name", ["moco_v3", "deit"])
def test_xla_compiles_once_and_soon(name):
    recipe = RECIPES[name](size=224)
    apply = tf.function(recipe.apply, input_signature=[
        tf.TensorSpec([None, None, 3], tf.uint8), tf.TensorSpec([2], tf.int32)])
    times = []
    for i in range(8):
        image = tf.constant(noise(240 + 9 * i, 300 - 5 * i, 3))
        start = time.perf_counter()
        apply(image, tf.constant([i, 3 * i]))
        times.append(time.perf_counter() - start)
    assert times[0] < 60.0
    assert np.median(times[1:]) < times[0] / 4      # a new image or seed that compiled again would take as long


def test_eval_can_leave_small_images_whole():
    image = noise(28, 28, 3)
    drawn = RECIPES["eval"](size=28, shorter_side=28).apply(tf.constant(image), tf.constant([0, 0]))["image"]
    np.testing.assert_array_equal(drawn, image)


def test_crop_min_one_without_stages_is_the_whole_image():
    recipe = RECIPES["quickstart"](size=28, crop_min=1.0, jitter=0.0, flip=0.0)
    image = noise(28, 28, 3)
    # Area 1 fits only at aspect 1; otherwise the fallback is the whole square too.
    np.testing.assert_array_equal(recipe.apply(tf.constant(image), tf.constant([4, 4]))["key"], image)


def test_quickstart_names_its_views_as_the_method_does():
    image, seed = tf.constant(noise(28, 28, 3)), tf.constant([1, 2])
    usual = RECIPES["quickstart"]().apply(image, seed)
    renamed = RECIPES["quickstart"](names=("view_1", "view_2")).apply(image, seed)
    assert list(renamed) == ["view_1", "view_2"]
    for view, other in zip(usual.values(), renamed.values()):
        np.testing.assert_array_equal(view, other)


@pytest.mark.parametrize("height, width", [(375, 500), (60, 47)])
def test_eval_may_be_bicubic(height, width):
    """DeiT's: Pillow resizes the whole image, then the middle is cut out."""
    image = noise(height, width, 3)
    whole_height, whole_width = (int(256 * n / min(height, width)) for n in (height, width))
    top, left = round((whole_height - 224) / 2), round((whole_width - 224) / 2)
    whole = np.asarray(Image.fromarray(image).resize((whole_width, whole_height), Image.Resampling.BICUBIC))
    drawn = RECIPES["eval"](interpolation="bicubic").apply(tf.constant(image), tf.constant([0, 0]))["image"]
    differences = np.abs(drawn.numpy().astype(int) - whole[top:top + 224, left:left + 224])
    assert differences.max() <= 1 and np.mean(differences > 0) < 0.01


@pytest.mark.parametrize("name, xla", [("moco_v1", True), ("moco_v2", False), ("cmc", True),
                                       pytest.param("moco_v3", True, marks=pytest.mark.slow)])
def test_a_device_finishes_crops_to_the_level_as_the_host_draws_views(name, xla):
    recipe, count = RECIPES[name](size=32, xla=xla), 24
    images, drawn = tf.constant(noise(count, 40, 48, 3)), seeds(count)
    crops = recipe.crops()
    one_by_one = [crops.apply(image, seed) for image, seed in zip(images, drawn)]
    batch = {key: tf.stack([one[key] for one in one_by_one]) for key in one_by_one[0]}
    for found in (crops.finish_batch({**batch, "index": tf.range(count)}),
                  crops.finish_batch(crops.apply_batch(images, drawn))):
        assert set(found) - {"index"} == set(recipe.views)
        for view in recipe.views:
            expected = tf.stack([recipe.apply(image, seed)[view] for image, seed in zip(images, drawn)])
            np.testing.assert_array_equal(found[view], expected)
            assert np.any(found[view] != tf.transpose(batch[view], [0, 3, 1, 2]))


def test_a_device_does_not_finish_randaugment():
    with pytest.raises(UsageError, match="RandAugment. Leave data.device_views out"):
        RECIPES["deit"]().crops()


def test_unknown_interpolation_is_refused():
    with pytest.raises(UsageError, match="one of bilinear, bicubic. Received: 'lanczos'"):
        RECIPES["eval"](interpolation="lanczos")


def test_a_pair_of_views_to_retrieve_one_by_the_other():
    two, one = RECIPES["moco_v2"](size=16), RECIPES["insdis"](size=16)
    assert two.pair() is two
    drawn = one.pair().apply(tf.constant(noise(20, 33, 3)), tf.constant([1, 2]))
    assert set(drawn) == {"query", "query_again"} and np.any(drawn["query"] != drawn["query_again"])


RGB_D = dict(mean=(0.5, 0.4, 0.3, 0.2), std=(0.25, 0.2, 0.3, 0.1))


def test_cmc_draws_one_crop_or_two():
    image, seed = tf.constant(noise(40, 33, 3)), tf.constant([1, 2])
    one, two = RECIPES["cmc"](size=16), RECIPES["cmc"](size=16, space="YCbCr", names=("query", "key"))
    assert (one.space, two.space) == ("Lab", "YCbCr") and one.mean is None
    crops = two.apply(image, seed)
    assert list(one.apply(image, seed)) == ["query"] and list(crops) == ["query", "key"]
    assert np.any(crops["query"] != crops["key"])
    assert all(view.dtype == tf.uint8 and view.shape == (16, 16, 3) for view in crops.values())
    assert list(one.pair().views) == ["query", "query_again"] and one.pair().space == "Lab"
    with pytest.raises(UsageError, match="Lab, YCbCr.*Received: 'lab'"):
        RECIPES["cmc"](space="lab")


@pytest.mark.parametrize("name, options, xla", [
    ("cmc", dict(space="Lab"), True), ("cmc", dict(space="HSV", names=("query", "key")), False),
    ("train_linear", {}, True)])
def test_views_normalized_in_the_pipeline_or_in_the_step_are_equal(name, options, xla):
    """From the same draws, one by one and in batches."""
    recipe, images, drawn = RECIPES[name](size=20, xla=xla, **options), tf.constant(noise(6, 28, 28, 3)), seeds(6)
    normalized = recipe.normalized()
    batch, ready = recipe.apply_batch(images, drawn), normalized.apply_batch(images, drawn)
    for view in recipe.views:
        assert ready[view].dtype == tf.float32
        np.testing.assert_allclose(ready[view], recipe.normalize(batch[view]), rtol=0, atol=1e-6)
    for i in range(3):
        levels, ready = recipe.apply(images[i], drawn[i]), normalized.apply(images[i], drawn[i])
        for view in recipe.views:
            np.testing.assert_allclose(ready[view], recipe.normalize(levels[view][None])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [
    ("float32", 1e-5), ("float64", 1e-12), ("bfloat16", 1e-2), ("float16", 1e-3)])
def test_a_colour_space_in_each_precision(dtype, tolerance):
    """Half precision only at the end: chroma is a difference of close numbers."""
    images = tf.constant(noise(2, 6, 5, 3))
    found = RECIPES["cmc"]().normalize(images, dtype)
    assert found.dtype == tf.as_dtype(dtype)
    exact = colour.normalized(images, "Lab", -1, tf.float64)
    np.testing.assert_allclose(tf.cast(found, tf.float64), exact, rtol=0, atol=tolerance)


def test_channels_of_any_number():
    """Channel by channel as the same crop of RGB."""
    image, seed = noise(30, 40, 4), tf.constant([1, 2])
    recipe = RECIPES["channels"](size=16, **RGB_D)
    view = recipe.apply(tf.constant(image), seed)["query"]
    assert view.shape == (16, 16, 4) and view.dtype == tf.uint8 and recipe.channels == 4
    three = RECIPES["cmc"](size=16).apply(tf.constant(image[..., 1:]), seed)["query"]
    np.testing.assert_array_equal(view[..., 1:], three)
    small = recipe.apply_batch(tf.constant(image[None]), seed[None])["query"][0]
    assert np.abs(np.int32(small) - np.int32(view)).max() <= 1
    expected = (np.asarray(view) / 255.0 - RGB_D["mean"]) / RGB_D["std"]
    np.testing.assert_allclose(recipe.normalize(view[None])[0], expected, atol=1e-5)
    np.testing.assert_allclose(recipe.normalized().apply(tf.constant(image), seed)["query"], expected, atol=1e-5)
    for count in (1, 2, 13):
        many = RECIPES["channels"](size=8, mean=(0.5,) * count, std=(0.25,) * count, names=("query", "key"))
        views = many.normalized().apply(tf.constant(noise(12, 9, count)), seed)
        assert all(view.shape == (8, 8, count) for view in views.values()) and list(views) == ["query", "key"]
        assert RECIPES["eval"](size=8).apply(tf.constant(noise(12, 9, count)), seed)["image"].shape == (8, 8, count)


def test_recipes_that_need_colours_say_so():
    for name in ("moco_v1", "moco_v2", "moco_v3", "insdis", "quickstart", "cmc", "deit"):
        RECIPES[name]().require_channels(3)
        with pytest.raises(UsageError, match="take images of 3 channels. Received: 4 channels"):
            RECIPES[name]().require_channels(4)
    for name in ("eval", "train_linear", "transfer"):
        RECIPES[name]().require_channels(7)
    with pytest.raises(UsageError, match="images of 4 channels. Received: 3"):
        RECIPES["channels"](**RGB_D).require_channels(3)
    for options in ({}, dict(mean=(0.5, 0.5), std=(0.2,))):
        with pytest.raises(UsageError, match="need views.mean and views.std, a number for each channel"):
            RECIPES["channels"](**options)
