"""CMC's half AlexNet: published parameter counts, shapes and names, initial values. Its outputs: tests/golden."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.alexnet import NUMBERED_LAYERS, alexnet
from moco_tf.errors import UsageError
from moco_tf.heads import encoder, linear

keras = tf.keras


def count(variables):
    return sum(variable.shape.num_elements() for variable in variables)


def counts(model):
    """{"conv_block_1": parameters, ...}"""
    blocks = {}
    for layer in model.layers:
        block = layer.name.split(".")[0]
        blocks[block] = blocks.get(block, 0) + count(layer.trainable_variables)
    return {name: number for name, number in blocks.items() if number}


@pytest.mark.parametrize("channels, first_block, total", [(1, 5_904, 14_840_976), (2, 11_712, 14_846_784)])
def test_parameter_counts(channels, first_block, total):
    with tf.Graph().as_default():
        model = encoder(BACKBONES["alexnet"](channels=channels), linear)
    assert counts(model) == {
        "conv_block_1": first_block, "conv_block_2": 153_856, "conv_block_3": 221_568, "conv_block_4": 332_160,
        "conv_block_5": 221_440, "fc6": 9_443_328, "fc7": 4_200_448, "fc": 262_272}
    assert count(model.trainable_variables) == total


def test_the_numbered_layers_have_the_shapes_of_the_code():
    with tf.Graph().as_default():
        model = alexnet(channels=1)
        shapes = {number: model.get_layer(name).output_shape[1:] for number, name in NUMBERED_LAYERS.items()}
    assert shapes == {1: (27, 27, 48), 2: (13, 13, 128), 3: (13, 13, 192), 4: (13, 13, 192), 5: (6, 6, 128), 6: (2048,),
                      7: (2048,)}
    assert model.output.name.startswith("features")


def test_layers_with_weights_have_the_names_of_the_codes_modules():
    with tf.Graph().as_default():
        names = {layer.name for layer in alexnet().layers if layer.weights}
    convolutions = {f"conv_block_{block}.{part}" for block in range(1, 6) for part in (0, 1)}
    assert names == convolutions | {"fc6.0", "fc6.1", "fc7.0", "fc7.1"}


def test_the_smallest_image_leaves_one_pixel():
    with tf.Graph().as_default():
        model = alexnet(size=63, channels=2)
        assert model.get_layer(NUMBERED_LAYERS[5]).output_shape[1:] == (1, 1, 128)
        assert model.get_layer("fc6.0").kernel.shape == (128, 2048)


def test_weights_start_as_pytorch_starts_them():
    model = alexnet(size=64, channels=1)
    for name, fan_in in (("conv_block_1.0", 121), ("conv_block_3.0", 9 * 128), ("fc6.0", 128), ("fc7.0", 2048)):
        layer = model.get_layer(name)
        for weight in layer.weights:
            assert np.abs(weight).max() <= fan_in ** -0.5
            np.testing.assert_allclose(np.std(weight), (3 * fan_in) ** -0.5, rtol=0.05, err_msg=weight.name)
        assert len(layer.weights) == (2 if name.startswith("fc") else 1)


def test_it_trains_in_groups_of_images_and_can_be_cloned():
    model = keras.models.clone_model(alexnet(size=64, channels=2, bn_group_size=2))
    assert {layer.group_size for layer in model.layers if hasattr(layer, "group_size")} == {2}
    images = np.random.default_rng(0).normal(size=(4, 64, 64, 2)).astype(np.float32)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(images, training=True) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    halves = [model(images[rows], training=True) for rows in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(tf.concat(halves, 0), model(images, training=True), atol=1e-4)


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
def test_precision_policies(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = alexnet(size=64, channels=1)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    features = model(np.random.default_rng(0).normal(size=(4, 64, 64, 1)), training=True)
    assert features.dtype == keras.mixed_precision.Policy(policy).compute_dtype
    assert np.isfinite(tf.cast(features, tf.float32)).all()


@pytest.mark.parametrize("size", [62, 32, None])
def test_images_that_are_too_small_are_refused(size):
    with pytest.raises(UsageError, match=f"at least 63 pixels.*size {size}"):
        alexnet(size=size)
