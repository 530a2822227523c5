"""Heads: shapes, names and PyTorch's initial values; the encoder joins them to a backbone."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones.resnet import resnet
from moco_tf.heads import HEADS, encoder, mlp

keras = tf.keras


def head_model(name, width=64, dtype=None, **arguments):
    features = keras.Input((width,), dtype=dtype)
    return keras.Model(features, HEADS[name](features, **arguments))


def test_linear_is_one_layer():
    model = head_model("linear", dim=8)
    assert [(w.name, tuple(w.shape)) for w in model.weights] == [("fc/kernel:0", (64, 8)), ("fc/bias:0", (8,))]


@pytest.mark.parametrize("hidden_dim, widths", [(None, [64]), (32, [32]), ((32, 16), [32, 16])])
def test_mlp_has_hidden_layers_as_wide_as_asked_or_as_the_features(hidden_dim, widths):
    model = head_model("mlp", dim=8, hidden_dim=hidden_dim)
    kernels = {w.name: tuple(w.shape) for w in model.weights if "kernel" in w.name}
    assert kernels == {f"fc.{2 * i}/kernel:0": shape for i, shape in enumerate(zip([64, *widths], [*widths, 8]))}


def test_mlp_equals_its_formula():
    model = head_model("mlp", dim=8, hidden_dim=32)
    kernel_1, bias_1, kernel_2, bias_2 = model.get_weights()
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    expected = np.maximum(x @ kernel_1 + bias_1, 0) @ kernel_2 + bias_2
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-5)


def test_weights_and_biases_start_uniform_within_one_over_root_inputs():
    kernel, bias = head_model("linear", width=256, dim=512).get_weights()
    for values in (kernel, bias):
        assert np.abs(values).max() <= 1 / 16
        np.testing.assert_allclose(values.std(), 1 / 16 / np.sqrt(3), rtol=0.1)    # of a uniform distribution


@pytest.mark.parametrize("policy, dtype", [
    ("float32", "float32"), ("mixed_bfloat16", "float32"), ("mixed_float16", "float32"), ("float64", "float64")])
@pytest.mark.parametrize("name", sorted(HEADS))
def test_embeddings_are_at_least_float32(name, policy, dtype):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = head_model(name, dtype="float64" if policy == "float64" else None)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model.output.dtype == dtype


def test_encoder_is_flat_with_the_names_of_its_layers():
    backbone = resnet(depth=18, width=0.25, size=32)
    model = encoder(backbone, lambda features: mlp(features, dim=8))
    assert model.output_shape == (None, 8)
    names = [layer.name for layer in backbone.layers]
    assert [layer.name for layer in model.layers] == [*names, "fc.0", "fc.1", "fc.2"]
