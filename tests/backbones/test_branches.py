"""Several encoders as one, as CMC has them: published parameter counts, whose channels a branch sees, names, refusals.
Outputs: tests/golden."""

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones.alexnet import alexnet
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.backbones.resnet import resnet
from moco_tf.errors import UsageError
from moco_tf.export.torch_weights import named_variables
from moco_tf.heads import encoder, linear, mlp
from moco_tf.momentum import momentum_copy
from moco_tf.normalization import BatchNorm

keras = tf.keras
CMC = (("l_to_ab", 1), ("ab_to_l", 2))
RNG = np.random.default_rng(0)


def branched(branches, build, head=linear, size=None):
    return encoder(branched_backbone(branches, build, size), lambda features: branched_head(branches, head, features))


def small(channels):
    """(B, 16, 16, channels) -> (B, 8), with what ResNets have: BatchNorm, and a layer of two inputs."""
    images = keras.Input((16, 16, channels), name="images")
    x = BatchNorm(name="bn1")(keras.layers.Conv2D(8, 3, name="conv1")(images))
    x = keras.layers.Add(name="add")([x, keras.layers.ReLU(name="relu")(x)])
    return keras.Model(images, keras.layers.GlobalAveragePooling2D(name="features")(x))


def small_encoder(branches=CMC):
    return branched(branches, small, lambda features: mlp(features, dim=4, hidden_dim=8), size=16)


# Both encoders of CMC with their heads, published. v1, v2 and v3 are of half, one and two widths.
COUNTS = {
    "alexnet": (lambda channels: alexnet(channels=channels), 29_687_760),
    **{f"resnet{depth}v{version}": (lambda channels, arguments=(depth, width): resnet(
        *arguments, stem_channels=64, channels=channels), total)
       for depth, totals in ((18, (5_686_336, 22_474_944, 89_439_424)), (50, (12_058_048, 47_531_200, 188_752_576)),
                             (101, (21_580_224, 85_515_456, 340_480_704)))
       for version, width, total in zip((1, 2, 3), (0.5, 1, 2), totals)}}
QUICK = ("alexnet", "resnet18v1")    # the others, branch by branch: test_resnet.py


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in COUNTS])
def test_parameter_counts(name):
    build, total = COUNTS[name]
    # In a graph variables take no memory, but building takes three times as long.
    with tf.Graph().as_default() if total > 10 ** 8 else contextlib.nullcontext():
        model = branched(CMC, build, size=224 if name == "alexnet" else None)
    assert sum(variable.shape.num_elements() for variable in model.trainable_variables) == total


def test_a_branch_is_the_backbone_and_the_head_of_its_channels():
    """What three branches give, side by side, is what three lone encoders with their weights give."""
    branches = (("red", 1), ("green_blue", 2), ("depth", 1))
    model = small_encoder(branches)
    weights, first = named_variables(model), 0
    images = RNG.normal(size=(3, 16, 16, 4)).astype(np.float32)
    features = keras.Model(model.input, model.get_layer("features").output)(images)
    for position, (name, channels) in enumerate(branches):
        lone = encoder(small(channels), lambda features: mlp(features, dim=4, hidden_dim=8))
        for own, variable in named_variables(lone).items():
            variable.assign(weights[f"{name}.{own}"])
        own = images[..., first:first + channels]
        np.testing.assert_allclose(model(images)[:, 4 * position:4 * position + 4], lone(own), atol=1e-5)
        np.testing.assert_allclose(features[:, 8 * position:8 * position + 8],
                                   keras.Model(lone.input, lone.get_layer("features").output)(own), atol=1e-5)
        first += channels
    assert (features.shape, model(images).shape) == ((3, 24), (3, 12))


def test_branches_start_with_weights_of_their_own():
    kernels = [small_encoder().get_layer(f"{name}.conv1").kernel.numpy() for name, _ in CMC]
    assert not np.array_equal(*kernels)
    np.testing.assert_allclose(*(kernel.std() for kernel in kernels), rtol=0.3)


def test_layers_carry_the_names_of_their_branches():
    names = {layer.name for layer in small_encoder().layers if layer.weights}
    lone = {layer.name for layer in encoder(small(1), mlp).layers if layer.weights}
    assert names == {f"{branch}.{name}" for branch, _ in CMC for name in lone}


def test_they_train_together_and_can_be_copied():
    model = small_encoder()
    twin = momentum_copy(model)
    images = RNG.normal(size=(4, 16, 16, 3)).astype(np.float32)
    np.testing.assert_allclose(twin(images), model(images), atol=1e-6)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(images, training=True) ** 2)
    assert all(np.abs(gradient).max() > 0 for gradient in tape.gradient(loss, model.trainable_variables))


@pytest.mark.parametrize("policy, dtype", [("mixed_bfloat16", "float32"), ("float64", "float64")])
def test_embeddings_are_at_least_float32(policy, dtype):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = small_encoder()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert model.output.dtype == dtype
    assert model.get_layer("features").output.dtype == keras.mixed_precision.Policy(policy).compute_dtype


@pytest.mark.parametrize("branches", [(), (("a", 1), ("a", 2)), (("", 3),), (("a", 1), ("b", 0))])
def test_branches_without_name_or_channels_are_refused(branches):
    with pytest.raises(UsageError, match="pairs of a name"):
        branched_backbone(branches, small)
