"""Heads: shapes, names and PyTorch's initial values; the encoder joins them to a backbone."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones.resnet import resnet
from moco_tf.heads import HEADS, encoder, linear, mlp, parts, predictor
from moco_tf.normalization import BatchNorm

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
    for values in (kernel, bias, predictor(dim=256, hidden_dim=512).get_layer("predictor.0").get_weights()[0]):
        assert np.abs(values).max() <= 1 / 16
        np.testing.assert_allclose(values.std(), 1 / 16 / np.sqrt(3), rtol=0.1)    # of a uniform distribution


def shapes(model):
    return {w.name[:-2]: tuple(w.shape) for w in model.weights}


def norm(name, width, affine=True):
    kinds = ("gamma", "beta", "moving_mean", "moving_variance")[0 if affine else 2:]
    return {f"{name}/{kind}": (width,) for kind in kinds}


def test_projectors_have_the_layers_of_the_papers_table():
    two = {"fc.0/kernel": (64, 32), **norm("fc.1", 32), "fc.3/kernel": (32, 8), **norm("fc.4", 8, affine=False)}
    assert shapes(head_model("projector", hidden_dim=32, dim=8)) == two
    three = {"fc.0/kernel": (64, 32), **norm("fc.1", 32), "fc.3/kernel": (32, 32), **norm("fc.4", 32),
             "fc.6/kernel": (32, 8), **norm("fc.7", 8, affine=False)}
    assert shapes(head_model("projector", layers=3, hidden_dim=32, dim=8)) == three


def test_a_predictor_ends_in_batchnorm_only_when_asked():
    plain = {"predictor.0/kernel": (8, 32), **norm("predictor.1", 32), "predictor.3/kernel": (32, 8)}
    assert shapes(predictor(dim=8, hidden_dim=32)) == plain
    assert shapes(predictor(dim=8, hidden_dim=32, last_bn=True)) == {**plain, **norm("predictor.4", 8, affine=False)}


@pytest.mark.parametrize("width, layers, parameters", [(2048, 2, 9445376), (384, 3, 19415040), (768, 3, 20987904)])
def test_published_numbers_of_parameters(width, layers, parameters):
    with tf.Graph().as_default():
        assert sum(w.shape.num_elements() for w in head_model("projector", width, layers=layers).trainable_weights) == \
            parameters
        assert sum(w.shape.num_elements() for w in predictor().trainable_weights) == 2105344


def test_projector_equals_its_formula():
    """In training mode, so with the batch's own mean and biased variance."""
    rng = np.random.default_rng(0)
    model = head_model("projector", hidden_dim=32, dim=8)
    model.set_weights([rng.normal(size=w.shape) for w in model.get_weights()])
    kernel_1, gamma, beta, _, _, kernel_2, _, _ = model.get_weights()
    x = rng.normal(size=(16, 64)).astype(np.float32)

    def normalized(y):
        return (y - y.mean(axis=0)) / np.sqrt(y.var(axis=0) + 1e-5)

    expected = normalized(np.maximum(normalized(x @ kernel_1) * gamma + beta, 0) @ kernel_2)
    np.testing.assert_allclose(model(x, training=True), expected, rtol=1e-3, atol=1e-4)


def test_batchnorm_in_heads_has_the_groups_asked_for():
    models = [head_model("projector", hidden_dim=32, dim=8, bn_group_size=4), predictor(8, bn_group_size=4)]
    for model in models:
        groups = [layer.group_size for layer in model.layers if isinstance(layer, BatchNorm)]
        assert groups and set(groups) == {4}


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


@pytest.mark.parametrize("policy, dtype", [("mixed_bfloat16", "float32"), ("float64", "float64")])
def test_predictions_are_at_least_float32(policy, dtype):
    keras.mixed_precision.set_global_policy(policy)
    try:
        assert predictor(dim=8, hidden_dim=16, last_bn=True).output.dtype == dtype
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_encoder_is_flat_with_the_names_of_its_layers():
    backbone = resnet(depth=18, width=0.25, size=32)
    model = encoder(backbone, lambda features: mlp(features, dim=8))
    assert model.output_shape == (None, 8)
    names = [layer.name for layer in backbone.layers]
    assert [layer.name for layer in model.layers] == [*names, "fc.0", "fc.1", "fc.2"]


def test_parts_of_an_encoder_share_its_weights():
    images = keras.Input((4, 4, 3))
    backbone = keras.Model(images, keras.layers.GlobalAveragePooling2D(name="features")(images))
    model = encoder(backbone, lambda features: linear(features, dim=2))
    split, x = parts(model), np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    assert list(split) == ["backbone", "embedding"]
    np.testing.assert_allclose(split["backbone"](x), x.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
    model.get_layer("fc").kernel.assign(np.eye(3, 2))
    model.get_layer("fc").bias.assign([1.0, 2.0])
    np.testing.assert_allclose(split["embedding"](x), split["backbone"](x)[:, :2] + [1.0, 2.0], rtol=1e-5)
