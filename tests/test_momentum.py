"""The momentum encoder: parameters follow, statistics are its own."""

import numpy as np
import tensorflow as tf

from moco_tf.backbones.resnet import resnet
from moco_tf.heads import encoder, linear
from moco_tf.momentum import momentum_copy, momentum_update


def small_encoder():
    return encoder(resnet(depth=18, width=0.0625, stem="cifar", size=8, bn_group_size=4), lambda x: linear(x, dim=4))


def values(model, trainable):
    return {w.name: w.numpy() for w in model.weights if ("moving" not in w.name) == trainable}


def test_copy_is_equal_and_frozen():
    model = small_encoder()
    twin = momentum_copy(model)
    assert twin.trainable_weights == []
    for ours, theirs in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_array_equal(ours, theirs)


def test_update_averages_parameters_and_leaves_statistics():
    model = small_encoder()
    twin = momentum_copy(model)
    rng = np.random.default_rng(0)
    model.set_weights([w + rng.normal(size=w.shape) for w in model.get_weights()])
    before = values(twin, True), values(twin, False)
    tf.function(momentum_update)(twin, model, 0.9)
    for name, value in values(twin, True).items():
        np.testing.assert_allclose(value, 0.9 * before[0][name] + 0.1 * values(model, True)[name], rtol=1e-5, atol=1e-6)
    for name, value in values(twin, False).items():
        np.testing.assert_array_equal(value, before[1][name])


def test_a_frozen_twin_normalises_by_its_batch_and_keeps_its_own_statistics():
    model = small_encoder()
    twin = momentum_copy(model)
    images = tf.random.stateless_normal((4, 8, 8, 3), (0, 0)) * 3 + 1
    np.testing.assert_allclose(twin(images, training=True), model(images, training=True), rtol=1e-5, atol=1e-5)
    assert not np.allclose(twin(images, training=True), twin(images, training=False), atol=1e-2)
    moved = values(twin, False)
    assert any(np.abs(value).max() > 0.1 for name, value in moved.items() if "moving_mean" in name)
