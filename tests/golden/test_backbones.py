"""Encoders with the rule's weights against PyTorch's outputs: every run of kind `encoder` whose model exists here."""

import zlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.evaluation.encoders import Encoder
from moco_tf.evaluation.layers import at_layer
from moco_tf.heads import parts
from moco_tf.losses import unit

from . import replay, weights

keras = tf.keras


@pytest.mark.parametrize("run", replay.runs("rule"), ids=lambda run: run.id)
def test_the_rule_draws_the_reference_values(run):
    settings = run.settings
    for name, shape in settings["parameters"].items():
        drawn = weights.param(name, shape, settings["seed"]).ravel()[:settings["first"]]
        np.testing.assert_array_equal(drawn, run[name])
    rows, columns = settings["corner"]
    for key, rule in settings["images"].items():
        np.testing.assert_array_equal(weights.draw(rule)[:, :rows, :columns], run[key])


def _is_slow(settings):
    """Wide ResNets, and those of two branches but the narrowest."""
    backbone, widest = settings["backbone"], 512 if len(settings["branches"]) > 1 else 2048
    return "depth" in backbone and (backbone["features"] > widest or backbone.get("width_per_group", 64) > 64)


@pytest.mark.parametrize(**replay.cases("encoder", replay.has_encoder, _is_slow))
def test_encoder(run, tag):
    settings = run.settings
    images = weights.draw(settings["inputs"])
    assert "%08x" % zlib.crc32(images.tobytes()) == settings["inputs_crc32"]
    stages = settings["stages"] if tag == "f32" else []    # stored in float32 only
    with replay.precision(tag):
        views, probed = _layers(settings, images, stages)

    first = views[settings["branches"][0]["view"]]
    for stage in stages:
        means = REDUCED["spatial_mean"](first[f"stage {stage}"])[:, :settings["stage_channels"]]
        replay.check(run, tag, means, run[f"stage/{stage}"], stage)
    stored = set(run.keys(f"{tag}/"))
    outputs = {key: wanted for key, wanted in settings["outputs"].items() if f"{tag}/{key}" in stored}
    assert stored == {f"{tag}/{key}" for key in [*outputs, *(probe["key"] for probe in settings["probes"])]}
    for key, wanted in outputs.items():
        value = views[wanted["view"]][wanted["layer"]]
        value = REDUCED[wanted["reduce"]](unit(value) if wanted["normalize"] else value)
        assert value.dtype == replay.DTYPES[tag]
        replay.check(run, tag, value[:, :wanted["first"]], run[f"{tag}/{key}"], key)
    for probe in settings["probes"]:
        scores = _scores(probe, probed[probe["key"]], settings["seed"])
        replay.check(run, tag, scores, run[f"{tag}/{probe['key']}"], probe["key"])
    if settings["position_rows"]:
        np.testing.assert_allclose(first["positions"], run["pos_embed"], rtol=0, atol=1e-6)


REDUCED = {None: lambda x: x, "spatial_mean": lambda x: tf.reduce_mean(x, axis=(1, 2)),
           "flatten_nhwc": lambda x: tf.reshape(x, [len(x), -1])}


def _layers(settings, images, stages):
    """What an encoder makes of images.

    Returns:
        ({view: {a layer as the run's outputs and stages call it: value}}, {key of a probe: features of its layer}).
    """
    training, numbered = settings["mode"] == "train", replay.layer_names(settings)
    model = replay.build_encoder(settings)
    names = {"pooled": "features", **numbered, **{f"stage {stage}": _stage_output(model, stage) for stage in stages}}
    prefixes = [f"{name}." for name, _ in replay.branches_of(settings)] or [""]
    views = {branch["view"]: {key: model.get_layer(prefix + name).output for key, name in names.items()}
             for branch, prefix in zip(settings["branches"], prefixes)}
    probed = {probe["key"]: _probed(settings, model, probe) for probe in settings["probes"]}
    whole, views, probed = keras.Model(model.input, [model.output, views, probed])(images, training=training)
    for branch, head in zip(settings["branches"], tf.split(whole, len(views), axis=1)):
        layers = views[branch["view"]]
        layers["head"] = head
        if settings["head"]:    # the layer behind the numbered ones, with the model's own norm where it has one
            layers[f"layer{1 + len(numbered)}"] = unit(head) if settings["head"].get("normalize") else head
    first = views[settings["branches"][0]["view"]]
    if settings["predictor"]:
        first["predictor"] = replay.build_predictor(settings)(first["head"], training=training)
    if settings["position_rows"]:
        first["positions"] = model.get_layer("tokens").pos_embed.numpy()[0, settings["position_rows"]]
    return views, probed


def _probed(settings, model, probe):
    """The features that a linear probe of a layer trains on, pooled as our recipe has it."""
    recipe = {"alexnet": "linear_cmc", "resnet": "linear_cmc_r50"}[settings["backbone"]["family"]]
    opened = Encoder("golden", "", parts(model), None, settings["image_size"], replay.config_of(settings))
    return at_layer(opened, int(probe["layer"][len("layer"):]), **configs.load(recipe).pool).models["backbone"].output


def _scores(probe, features, seed):
    """Scores of a linear probe with the rule's weights."""
    shapes = {"weight": (probe["classes"], probe["in_features"]), "bias": (probe["classes"],)}
    weight, bias = (tf.cast(weights.param(f"{probe['name']}.{part}", shape, seed), features.dtype)
                    for part, shape in shapes.items())
    return tf.matmul(features, weight, transpose_b=True) + bias


def _stage_output(model, stage):
    """The last layer of `layer3` and the like."""
    return [layer.name for layer in model.layers if layer.name == stage or layer.name.startswith(f"{stage}.")][-1]
