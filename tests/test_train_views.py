"""What `train` makes of a recipe: its normaliser, the notes before a run, mixed views in a run and in its picture."""

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from moco_tf import config as configs
from moco_tf import train
from moco_tf.data import tools
from moco_tf.data.sources import open_source
from moco_tf.errors import UsageError
from moco_tf.views import colour
from moco_tf.views.recipes import RECIPES
from runs import lines

keras = tf.keras


def config_of(**values):
    """Smoke's on few images, with these keys (__ for a dot)."""
    small = {"data.fraction": 0.05, "batch_size": 250, "bn_group_size": 50, "views.size": 8, "method.queue_size": 500,
             "log.tensorboard": False, "monitor.bank": 100, "monitor.queries": 50}
    return configs.override(configs.load("smoke"), **small, **{k.replace("__", "."): v for k, v in values.items()})


def colourful(folder, grey, count=12):
    """So many images, some of them grey."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (9, 8, 1 if i < grey else 3), np.uint8)
        Image.fromarray(np.broadcast_to(pixels, (9, 8, 3))).save(folder / f"{i:02d}.png")
    return str(folder)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_normalizer_of_a_colour_space(policy):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    keras.mixed_precision.set_global_policy(policy)
    try:
        found = train.normalizer(RECIPES["cmc"](space="YCbCr"))(tf.constant(images))
    finally:
        keras.mixed_precision.set_global_policy("float32")
    exact = colour.normalized(images, "YCbCr", -1, tf.float64)
    assert found.dtype == ("float32" if policy == "float32" else "bfloat16")
    np.testing.assert_allclose(tf.cast(found, tf.float64), exact, atol=1e-6 if policy == "float32" else 1e-2)


@pytest.mark.parametrize("grey, told", [(4, False), (5, True)])
def test_many_grey_images_are_told_of_where_colour_is_a_view(tmp_path, grey, told):
    """A third may be."""
    source = open_source("folder", colourful(tmp_path / "images", grey))
    config = config_of().unlock()
    for name, expected in (("cmc", told), ("moco_v2", False)):
        config.views = ConfigDict(dict(name=name, size=8))
        told_lines = train.data_lines(config, source, None, 1)
        assert ("are grey" in " ".join(told_lines)) == expected


def test_a_stream_that_is_mixed_is_told_of(tmp_path):
    tools.pack(colourful(tmp_path / "images", 0), str(tmp_path / "packed"))
    records, folder = open_source("records", str(tmp_path / "packed")), open_source("folder", str(tmp_path / "images"))
    for name, source, told in (("im", records, True), ("im", folder, False), ("cutout", records, False),
                               ("none", records, False), ("unmix", records, False)):
        told_lines = train.data_lines(config_of(mixture__name=name), source, None, 1)
        assert ("read as a stream" in " ".join(told_lines)) == told


def test_wrong_choices_are_named():
    with pytest.raises(UsageError, match="mixture.name must be one of cutout, global, im, .*Received: 'mixup'"):
        train.image_mixture(config_of(mixture__name="mixup"))
    config = config_of().unlock()
    config.mixture = dict(name="cutout", g_alpha=2.0)
    with pytest.raises(UsageError, match="'cutout' takes mask_size, .*Received besides: g_alpha"):
        train.image_mixture(config)
    with pytest.raises(UsageError, match="data.normalize must be one of step, input. Received: 'host'"):
        train.normalized_in_input(config_of(data__normalize="host"))
    with pytest.raises(UsageError, match="cannot normalise or mix those. Received: data.normalize step, mixture im"):
        train.input_recipe(config_of(data__device_views=True, mixture__name="im"), RECIPES["moco_v2"]())
    assert train.image_mixture(config_of()) is None and train.image_mixture(config_of(mixture__name="unmix")) is None
    assert not train.normalized_in_input(config_of()) and train.normalized_in_input(config_of(mixture__name="im"))
    assert train.normalized_in_input(config_of(data__normalize="input"))


@pytest.mark.slow
def test_a_run_with_mixed_views_shows_them_and_learns_from_them(tmp_path):
    """Against the run without: another picture, of the same size, and another loss, from the same weights."""
    config = config_of().unlock()
    for name, mixture, normalize in (("plain", dict(name="none"), "step"), ("input", dict(name="none"), "input"),
                                     ("mixed", dict(name="region", r_prob=0.9), "step")):
        config.mixture, config.data.normalize = mixture, normalize
        train.pretrain(config, str(tmp_path / name))
    pictures, losses = {}, {}
    for name in ("plain", "input", "mixed"):
        with Image.open(tmp_path / name / "views.png") as picture:
            pictures[name] = np.asarray(picture)
        losses[name] = [line["loss"] for line in lines(tmp_path / name)]
    np.testing.assert_array_equal(pictures["plain"], pictures["input"])
    assert pictures["mixed"].shape == pictures["plain"].shape == (16, 64, 3)
    assert np.mean(pictures["mixed"] != pictures["plain"]) > 0.1
    np.testing.assert_allclose(losses["input"], losses["plain"], rtol=1e-4)
    assert abs(losses["mixed"][0] - losses["plain"][0]) > 1e-4
