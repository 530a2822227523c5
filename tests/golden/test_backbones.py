"""Encoders with the rule's weights against PyTorch's outputs: every run of kind `encoder` whose model exists here."""

import zlib

import numpy as np
import pytest
import tensorflow as tf

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


@pytest.mark.parametrize(**replay.cases("encoder", replay.has_encoder))
def test_encoder(run, tag):
    settings = run.settings
    images = weights.draw(settings["inputs"])
    assert "%08x" % zlib.crc32(images.tobytes()) == settings["inputs_crc32"]
    with replay.precision(tag):
        model = replay.build_encoder(settings)
        stages = settings["stages"] if tag == "f32" else []    # stored in float32 only
        layers = ["features", *(_stage_output(model, stage) for stage in stages)]
        outputs = keras.Model(model.input, [model.output, *(model.get_layer(layer).output for layer in layers)])(
            images[..., settings["branches"][0]["channels"]], training=settings["mode"] == "train")
        last, pooled, *maps = outputs
        # InsDis numbers its layers, and its last one is the head with the model's own norm.
        layers = {"pooled": pooled, "head": last, "layer6": pooled, "layer7": last}
        if settings["predictor"]:
            layers["predictor"] = replay.build_predictor(settings)(last, training=settings["mode"] == "train")

    for stage, features in zip(stages, maps):
        means = tf.reduce_mean(features, axis=(1, 2))[:, :settings["stage_channels"]]
        replay.check(run, tag, means, run[f"stage/{stage}"], stage)
    for key, wanted in settings["outputs"].items():
        norm = wanted["normalize"] or (wanted["layer"] == "layer7" and settings["head"]["normalize"])
        value = unit(layers[wanted["layer"]]) if norm else layers[wanted["layer"]]
        assert value.dtype == replay.DTYPES[tag]
        replay.check(run, tag, value[:, :wanted["first"]], run[f"{tag}/{key}"], key)
    if settings["position_rows"]:
        positions = model.get_layer("tokens").pos_embed.numpy()[0, settings["position_rows"]]
        np.testing.assert_allclose(positions, run["pos_embed"], rtol=0, atol=1e-6)


def _stage_output(model, stage):
    """The last layer of `layer3` and the like."""
    return [layer.name for layer in model.layers if layer.name == stage or layer.name.startswith(f"{stage}.")][-1]
