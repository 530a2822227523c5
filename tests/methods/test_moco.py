"""MoCo's step: where the loss starts, what a bad step leaves behind, and that XLA agrees."""

import math

import numpy as np
import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.methods.moco import MoCo
from moco_tf.optim.sgd import SGD
from moco_tf.shuffling import key_permutation, positions
from moco_tf.train import build_method

keras = tf.keras


def tiny_config(**overrides):
    return configs.override(configs.load("smoke"), **{
        "batch_size": 8, "bn_group_size": 4, "views.size": 8, "method.queue_size": 64, "shuffle_bn": "none", **overrides})


def batch(step=0, size=8, images=8):
    base = np.random.default_rng(step).normal(size=(images, size, size, 3)).astype(np.float32)
    noise = np.random.default_rng(100 + step).normal(size=base.shape).astype(np.float32)
    return {"query": tf.constant(base), "key": tf.constant(base + 0.1 * noise), "key_position": tf.range(images)}


def state(method):
    return [v.numpy() for v in [*method.weights, *method.optimizer.variables]]


@pytest.mark.parametrize("temperature", [0.07, 0.2])    # v1's and v2's
def test_the_first_loss_of_random_features_is_near_log_k_plus_one(temperature):
    images = keras.Input((8, 8, 3))
    projection = keras.layers.Dense(128, use_bias=False, kernel_initializer=keras.initializers.RandomNormal(seed=0))
    encoder = keras.Model(images, projection(keras.layers.Flatten()(images)))
    method = MoCo(encoder, dim=128, queue_size=4096, temperature=temperature, momentum=0.999, shuffle_bn="none")
    method.compile(optimizer=SGD(0.03))
    rng = np.random.default_rng(0)
    noise = {name: tf.constant(rng.normal(size=(256, 8, 8, 3)).astype(np.float32)) for name in ("query", "key")}
    loss = float(method.train_step(noise)["loss"])
    # Cosines of random rows have variance 1/128, so that log E exp(cosine / T) adds 1 / (2 * 128 * T^2): 0.8 and 0.1.
    assert abs(loss - math.log(4097) - 1 / (2 * 128 * temperature ** 2)) < 0.3


def test_a_non_finite_step_leaves_everything_as_it_was_and_is_counted():
    method = build_method(tiny_config(), steps_per_epoch=10)
    step = tf.function(method.train_step)
    step(batch(0))
    before = state(method)
    broken = batch(1)
    broken["query"] = tf.tensor_scatter_nd_update(broken["query"], [[0, 0, 0, 0]], [float("nan")])
    logs = step(broken)
    after = state(method)
    assert int(logs["longest_bad_row"]) == 1 and int(logs["bad_steps"]) == 1
    changed = [v.name for v, a, b in zip([*method.weights, *method.optimizer.variables], before, after)
               if not np.array_equal(a, b)]
    # The momentum encoder has followed, and both encoders' statistics have moved by their finite batches; nothing else.
    assert all("moving" in name or "bad_" in name or "good_" in name or name in {v.name for v in method.key_encoder.weights} or
               "iteration" in name or "learning_rate" in name for name in changed)
    assert all(np.isfinite(value).all() for value in after if value.dtype.kind == "f")
    logs = step(batch(2))
    assert int(method.bad_in_row) == 0 and int(logs["bad_steps"]) == 1 and math.isfinite(float(logs["loss"]))


def test_loss_scaling_halves_on_overflow_and_leaves_the_gradients():
    plain, scaled = (build_method(tiny_config(precision=precision), steps_per_epoch=10)
                     for precision in ("float32", "float16"))    # the encoders stay float32: the policy is not set
    assert float(scaled.loss_scale) == 2.0 ** 16 and scaled.loss_scaling and not plain.loss_scaling
    for step in range(2):
        one, other = plain.train_step(batch(step)), scaled.train_step(batch(step))
        np.testing.assert_allclose(one["gradient_norm"], other["gradient_norm"], rtol=1e-4)
    scaled.loss_scale.assign(3e38)    # the scaled loss overflows
    assert int(scaled.train_step(batch(2))["bad_steps"]) == 1
    np.testing.assert_allclose(scaled.loss_scale, 1.5e38)


def test_gradients_are_clipped_to_the_norm_asked_for():
    free, clipped = (build_method(tiny_config(**{"optimizer.weight_decay": 0.0, "optimizer.momentum": 0.0}), 10)
                     for _ in range(2))
    clipped.clip_norm = 1.0
    moved = []
    for method in (free, clipped):
        before = [v.numpy() for v in method.trainable_weights]
        norm = float(method.train_step(batch())["gradient_norm"])
        lr = float(method.optimizer.learning_rate)
        moved.append(math.sqrt(sum(((v.numpy() - b) ** 2).sum() for v, b in zip(method.trainable_weights, before))) / lr)
    assert norm > 1
    np.testing.assert_allclose(moved, [norm, 1.0], rtol=1e-3)


@pytest.mark.parametrize("shuffle", ["input", "cross_replica"])
def test_the_whole_step_compiles_and_agrees(shuffle):
    """Through `fit`, as a run with jit_compile does it."""
    class Losses(keras.callbacks.Callback):
        def on_train_batch_end(self, index, logs):
            losses[-1].append(logs["loss"])

    views = {name: tf.concat([batch(step)[name] for step in range(3)], axis=0) for name in batch()}
    losses = []
    for jit in (False, True):
        losses.append([])
        method = build_method(tiny_config(shuffle_bn=shuffle, jit_compile=jit), steps_per_epoch=10)
        dataset = tf.data.Dataset.from_tensor_slices(views).batch(8, drop_remainder=True)
        method.fit(dataset, verbose=0, callbacks=[Losses()])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)    # a gate may have flipped by then


def test_both_ways_to_shuffle_pick_the_same_positives():
    ours = build_method(tiny_config(shuffle_bn="cross_replica"), steps_per_epoch=10)
    pipelines = build_method(tiny_config(shuffle_bn="input"), steps_per_epoch=10)
    for step in range(3):
        views = batch(step)
        order = key_permutation(0, step, 8, 4)
        dealt = {**views, "key": tf.gather(views["key"], order), "key_position": positions(order)}
        a, b = ours.train_step(views), pipelines.train_step(dealt)
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)
    for one, other in zip(state(ours), state(pipelines)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains_with_float32_losses_and_memory(precision):
    keras.mixed_precision.set_global_policy(precision)
    try:
        method = build_method(tiny_config(), steps_per_epoch=10)
        views = {name: tf.cast(v, method.encoder.compute_dtype) if v.dtype.is_floating else v
                 for name, v in batch().items()}
        logs = tf.function(method.train_step)(views)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert logs["loss"].dtype == tf.float32 and method.queue.keys.dtype == tf.float32
    assert int(logs["bad_steps"]) == 0 and math.isfinite(float(logs["loss"]))
