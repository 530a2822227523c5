"""Probes of numbered layers: CMC's classifier sizes, pooling and order by NumPy, encoders of branches, refusals."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from moco_tf import config as configs
from moco_tf.backbones import BACKBONES
from moco_tf.backbones.alexnet import NUMBERED_LAYERS
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.errors import UsageError
from moco_tf.evaluation.encoders import Encoder, open_encoder
from moco_tf.evaluation.layers import at_layer
from moco_tf.evaluation.splits import cached_splits
from moco_tf.heads import encoder as join, linear, parts
from moco_tf.train import build_schedule

from tiny import config_of, tiny_encoder, write_splits

keras = tf.keras
CMC = (("l_to_ab", 1), ("ab_to_l", 2))
ALEXNET, RESNET = (configs.load(name).pool for name in ("linear_cmc", "linear_cmc_r50"))


def encoder_of(name, size, branches=CMC, **arguments):
    def build(channels):
        return BACKBONES[name](size=size, channels=channels, **arguments)

    if branches:
        model = join(branched_backbone(branches, build, size),
                     lambda features: branched_head(branches, linear, features))
    else:
        model = join(build(3), linear)
    config = ConfigDict(dict(backbone=dict(name=name, **arguments), branches=branches))
    return Encoder("runs/cmc", "an encoder", parts(model), lambda images: tf.cast(images, tf.float32) / 255, size,
                   config)


def inputs(encoder, layers, pool):
    return [at_layer(encoder, layer, **pool).width for layer in layers]


def test_classifiers_of_alexnet_have_the_sizes_of_cmcs_code():
    widths = inputs(encoder_of("alexnet", 224), (1, 2, 3, 4, 5, 6, 7), ALEXNET)
    assert [1000 * (width + 1) for width in widths[:5]] == [9_601_000, 9_217_000, 9_601_000, 9_601_000, 9_217_000]
    assert [100 * (width + 1) for width in widths[:5]] == [960_100, 921_700, 960_100, 960_100, 921_700]
    assert widths[5:] == [4096, 4096]    # which that code does not probe


# Classes times (inputs + 1), of layers 1 to 6 at one width. The stem has 64 channels at every width, so that its inputs
# are those of CMC's halves, and half of them with one encoder; CMC's code has other numbers there, which do not run.
AT_ONE_WIDTH = [8192, 9216, 8192, 9216, 100_352, 2048]


@pytest.mark.parametrize("width, branches, scale", [
    (0.5, CMC, 1), pytest.param(1, CMC, 2, marks=pytest.mark.slow), pytest.param(2, CMC, 4, marks=pytest.mark.slow),
    pytest.param(1, (), 1, marks=pytest.mark.slow), pytest.param(2, (), 2, marks=pytest.mark.slow),
    pytest.param(4, (), 4, marks=pytest.mark.slow)])
def test_classifiers_of_resnet50_have_the_sizes_of_cmcs_code(width, branches, scale):
    # In a graph variables take no memory, but building takes three times as long.
    with tf.Graph().as_default() if width > 1 else contextlib.nullcontext():
        encoder = encoder_of("resnet", 224, branches, depth=50, width=width, stem_channels=64)
        widths = inputs(encoder, (1, 2, 3, 4, 5, 6), RESNET)
    assert widths == [8192 if branches else 4096, *(scale * inputs for inputs in AT_ONE_WIDTH[1:])]
    if scale == 1 and branches:
        assert [1000 * (inputs + 1) for inputs in widths] == [
            8_193_000, 9_217_000, 8_193_000, 9_217_000, 100_353_000, 2_049_000]
        assert [100 * (inputs + 1) for inputs in widths] == [819_300, 921_700, 819_300, 921_700, 10_035_300, 204_900]


def drops(epoch, lr):
    return lr * 0.2 ** sum(epoch > milestone for milestone in (30, 40, 50))


def cosine(epoch, lr):
    end = lr * 0.2 ** 3 * 0.1
    return end + (lr - end) * (1 + np.cos(np.pi * epoch / 60)) / 2


@pytest.mark.parametrize("name, lr, rule", [
    ("linear_cmc", 0.1, drops), ("linear_cmc_r50", 30.0, drops), ("linear_insdis", 30.0, drops),
    ("linear_insdis_adam", 0.001, drops), ("linear_insdis_cosine", 30.0, cosine)])
def test_rates_are_those_of_cmcs_code(name, lr, rule):
    """Its epochs count from 1, and its rates do not scale with the batch, of 256."""
    config = configs.load(name)
    schedule = build_schedule(config, steps_per_epoch=7)
    rates = [[float(schedule(tf.constant(7 * (epoch - 1) + step))) for step in (0, 6)] for epoch in range(1, 61)]
    np.testing.assert_allclose(rates, [[rule(epoch, lr)] * 2 for epoch in range(1, 61)], rtol=0,
                               atol=2e-6 * lr)    # float32, whose rounding is that of the largest
    assert (config.batch_size, config.epochs, config.optimizer.weight_decay) == (256, 60, 0.0)


@pytest.fixture(scope="module")
def halves():
    """Two AlexNets on images of 95 pixels, whose maps are of 11, 5, 5, 5 and 2 pixels."""
    return encoder_of("alexnet", 95)


@pytest.mark.parametrize("number, cells", [(1, 10), (3, 5), (5, 0), (6, 0), (7, 0)])
def test_features_are_pooled_joined_and_flattened_as_pytorch_does(halves, number, cells):
    images = np.random.default_rng(0).integers(0, 256, (2, 95, 95, 3), np.uint8)
    whole = halves.models["embedding"]
    outputs = [whole.get_layer(f"{name}.{NUMBERED_LAYERS[number]}").output for name, _ in CMC]
    maps = [output.numpy() for output in keras.Model(whole.input, outputs)(halves.normalize(images), training=False)]
    expected = []
    for image in range(2):
        for channel in (*np.moveaxis(maps[0][image], -1, 0), *np.moveaxis(maps[1][image], -1, 0)):
            side, pooled = len(channel) if channel.ndim else 1, channel
            if cells:
                edges = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
                pooled = np.array([[channel[a:b, c:d].max() for c, d in edges] for a, b in edges])
            expected.append(pooled.ravel())
    features = at_layer(halves, number, **ALEXNET).rows(images).numpy()
    np.testing.assert_allclose(features, np.concatenate(expected).reshape(2, -1), atol=1e-6)


def test_the_last_layer_of_a_resnet_is_its_features():
    encoder = encoder_of("resnet", 16, (), depth=18, width=0.125, stem="cifar")
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    probed = at_layer(encoder, 6, **RESNET)
    np.testing.assert_array_equal(probed.rows(images), encoder.rows(images))
    assert probed.description == "an encoder, layer 6" and set(probed.models) == {"backbone"}


def test_means_of_half_precision_maps_are_taken_in_float32():
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        rows = at_layer(encoder_of("resnet", 32, (), depth=18, width=0.125), 1, "avg", (1,)).rows(images)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert rows.dtype == tf.float32
    assert np.any(rows != tf.cast(tf.cast(rows, tf.bfloat16), tf.float32))    # more digits than bfloat16 has


@pytest.mark.parametrize("number", [0, 8, -1])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(halves, number):
    with pytest.raises(UsageError, match=rf"1 \(11, 11, 96\), .*7 \(4096,\)\. Received: layer {number} of runs/cmc"):
        at_layer(halves, number, **ALEXNET)


def test_encoders_without_numbered_layers_are_refused():
    with pytest.raises(UsageError, match="a SavedModel.*linear_v1v2"):
        at_layer(tiny_encoder(), 1)
    vit = ConfigDict(dict(backbone=dict(name="vit_small"), branches=()))
    with pytest.raises(UsageError, match="a vit_small"):
        at_layer(dataclasses.replace(tiny_encoder(), config=vit), 1)


BRANCHED = '''
from moco_tf.config import recipe


def get_config():
    config = recipe("smoke")
    config.update(dict(branches=(("l_to_ab", 1), ("ab_to_l", 2)), views=dict(name="cmc", size=8)))
    config.views = dict(name="cmc", size=8)
    return config
'''


@pytest.fixture
def branched(tmp_path):
    (tmp_path / "branched.py").write_text(BRANCHED)
    return f"random:{tmp_path / 'branched.py'}"


def test_an_encoder_of_branches_is_opened_and_evaluated(branched, tmp_path):
    """Features and embeddings stand side by side; each branch sees its channels of Lab only."""
    encoder = open_encoder(branched)
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    assert encoder.width == 2 * 32 and encoder.rows(images, "embedding").shape == (4, 2 * 16)
    grey = np.repeat(images[..., :1], 3, axis=-1)
    first, second = np.split(encoder.rows(grey).numpy(), 2, axis=1)
    assert np.ptp(first, axis=0).max() > 1e-3    # lightness differs
    np.testing.assert_allclose(second, np.repeat(second[:1], 4, axis=0), atol=1e-3)    # grey is of one colour
    bank, queries = cached_splits(encoder, config_of(write_splits(tmp_path)), "backbone", str(tmp_path / "cache"))
    assert (bank.dim, queries.dim, bank.count) == (64, 64, 120)
    resized = open_encoder(branched, size=16, precision="float32", bn_group_size=0)
    assert resized.rows(np.zeros([1, 16, 16, 3], np.uint8)).shape == (1, 64)


def test_images_of_four_channels_are_evaluated_by_branches_for_colour_and_depth(tmp_path):
    rng = np.random.default_rng(0)
    images = {split: rng.integers(0, 256, (count, 8, 8, 4), np.uint8) for split, count in (("train", 12), ("val", 6))}
    for split, its in images.items():
        np.savez(tmp_path / f"{split}.npz", images=its, labels=np.arange(len(its)) % 2)
    config = configs.override(configs.load("smoke"), **{
        "data.name": "arrays", "data.path": str(tmp_path), "data.channels": 4,
        "branches": (("colour", 3), ("depth", 1))})
    config.views = ConfigDict(dict(name="channels", size=8, mean=(0.5,) * 4, std=(0.25,) * 4))
    (tmp_path / "four.json").write_text(configs.to_json(config))
    encoder = open_encoder(f"random:{tmp_path / 'four.json'}")
    assert (encoder.channels, encoder.width) == (4, 64)
    bank, queries = cached_splits(encoder, config, "backbone", str(tmp_path / "cache"))
    assert (bank.count, queries.count, bank.dim) == (12, 6, 64)
    np.testing.assert_allclose(bank.all(), encoder.rows(images["train"]), rtol=1e-4, atol=1e-4)
