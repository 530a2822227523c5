"""MoCo v3's step: where the loss starts, what is frozen, what a bad step leaves behind, that XLA and a resume agree."""

import math
import shutil

import numpy as np
import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.methods.moco_v3 import MoCoV3
from moco_tf.optim.sgd import SGD
from moco_tf.train import build_method, pretrain
from runs import assert_same_run

keras = tf.keras

SLOW_RESNET = [pytest.param("resnet", marks=pytest.mark.slow), "vit"]    # XLA takes a minute to compile the ResNet
FAMILIES = {
    "resnet": ("moco_v3_r18_quickstart", {"backbone.width": 0.0625, "backbone.stem": "cifar"}),
    "vit": ("moco_v3_vit_tiny_quickstart", {"backbone.dim": 16, "backbone.depth": 2, "backbone.heads": 2,
                                            "backbone.patch": 4})}


def tiny_config(family, **overrides):
    recipe, smaller = FAMILIES[family]
    return configs.override(configs.load(recipe), **{
        "batch_size": 8, "views.size": 8, "head.hidden_dim": 32, "head.dim": 16, "predictor.hidden_dim": 32,
        "schedule.warmup_epochs": 0, "method.temperature": 0.2, **smaller, **overrides})


def batch(step=0, size=8, images=8):
    base = np.random.default_rng(step).normal(size=(images, size, size, 3)).astype(np.float32)
    noise = np.random.default_rng(100 + step).normal(size=base.shape).astype(np.float32)
    return {"view_1": tf.constant(base), "view_2": tf.constant(base + 0.1 * noise)}


def state(method):
    return [v.numpy() for v in [*method.weights, *method.optimizer.variables]]


def linear_method(temperature, predictor=None, momentum=0.99, **options):
    """A projection instead of networks, which keeps noise noise; the predictor leaves embeddings as they are."""
    images, embeddings = keras.Input((8, 8, 3)), keras.Input((128,))
    projection = keras.layers.Dense(128, use_bias=False, kernel_initializer=keras.initializers.Orthogonal(seed=0))
    encoder = keras.Model(images, projection(keras.layers.Flatten()(images)))
    method = MoCoV3(encoder, predictor or keras.Model(embeddings, embeddings), temperature, momentum, **options)
    method.compile(optimizer=SGD(0.03))
    return method


@pytest.mark.parametrize("temperature", [0.2, 1.0])    # transformers' and ResNets'
def test_the_first_loss_of_random_features_is_near_chance(temperature):
    method, rng = linear_method(temperature), np.random.default_rng(0)
    noise = {name: tf.constant(rng.normal(size=(256, 8, 8, 3)).astype(np.float32)) for name in method.view_names}
    logs = method.train_step(noise)
    assert method.chance_loss(256) == pytest.approx(4 * temperature * math.log(256))
    # Cosines of random rows have variance 1/128: log E exp(cosine / T) adds 1 / (2 * 128 * T^2) to each cross-entropy.
    expected = 4 * temperature * math.log(256) + 4 * temperature / (2 * 128 * temperature ** 2)
    assert abs(float(logs["loss"]) - expected) < 0.05
    assert float(logs["accuracy"]) < 0.05 and float(logs["accuracy_top5"]) < 0.1


def test_the_published_runs_start_where_the_spec_says():
    assert linear_method(1.0).chance_loss(4096) == pytest.approx(33.27, abs=0.01)
    assert linear_method(0.2).chance_loss(4096) == pytest.approx(6.65, abs=0.01)


def test_equal_views_find_their_positives():
    views = batch()
    logs = linear_method(0.2).train_step({"view_1": views["view_1"], "view_2": views["view_1"]})
    assert float(logs["accuracy"]) == 1


def test_both_views_are_queries_of_the_other_views_keys():
    """The loss in NumPy, of a predictor that turns and scales."""
    embeddings = keras.Input((128,))
    turn = np.random.default_rng(5).normal(size=(128, 128)).astype(np.float32)
    dense = keras.layers.Dense(128, use_bias=False, kernel_initializer=lambda *_, **__: tf.constant(turn))
    method, views = linear_method(0.3, keras.Model(embeddings, dense(embeddings))), batch()
    kernel = method.encoder.get_weights()[0].astype(np.float64)
    rows = {name: view.numpy().reshape(8, -1) @ kernel for name, view in views.items()}

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def term(query, key):
        logits = unit(rows[query] @ turn) @ unit(rows[key]).T / 0.3
        return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))

    expected = 2 * 0.3 * (term("view_1", "view_2") + term("view_2", "view_1"))
    np.testing.assert_allclose(method.train_step(views)["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("step, expected", [(0, 0.9), (50, 0.95), (100, 1.0)])
def test_the_momentum_rises_to_one_along_half_a_cosine(step, expected):
    method = linear_method(0.2, momentum_schedule="cosine", total_steps=100)
    method.momentum = 0.9
    method.optimizer.iterations.assign(step)
    np.testing.assert_allclose(method.momentum_now(), expected, rtol=1e-6)


@pytest.mark.parametrize("options, message", [(dict(momentum_schedule="linear"), "constant, cosine.*'linear'"),
                                              (dict(momentum_schedule="cosine"), "total_steps None"),
                                              (dict(momentum=1.01), "from 0 to 1. Received: 1.01"),
                                              (dict(temperature=0.0), "temperature .* above 0. Received: 0.0")])
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        linear_method(**{"temperature": 0.2, **options})


def test_what_is_frozen_neither_learns_nor_decays():
    method = build_method(tiny_config("vit", **{"optimizer.weight_decay": 0.5}), steps_per_epoch=10)
    patch, tokens = method.encoder.get_layer("patch_embed.proj"), method.encoder.get_layer("tokens")
    frozen = [*patch.weights, tokens.pos_embed]
    before, token = [v.numpy() for v in frozen], tokens.cls_token.numpy()
    for step in range(3):
        method.train_step(batch(step))
    trained = {v.ref() for v in method.trainable_weights}
    keys = [*method.key_encoder.get_layer("patch_embed.proj").weights, method.key_encoder.get_layer("tokens").pos_embed]
    for variable, key, value in zip(frozen, keys, before):
        assert variable.ref() not in trained
        np.testing.assert_array_equal(variable, value)
        np.testing.assert_array_equal(key, value)
    assert not np.array_equal(tokens.cls_token, token)
    assert len(method.optimizer.means) == len(method.trainable_weights)


def test_a_non_finite_step_leaves_everything_as_it_was_and_is_counted():
    method = build_method(tiny_config("vit"), steps_per_epoch=10)
    step = tf.function(method.train_step)
    step(batch(0))
    before = state(method)
    broken = batch(1)
    broken["view_1"] = tf.tensor_scatter_nd_update(broken["view_1"], [[0, 0, 0, 0]], [float("nan")])
    logs = step(broken)
    assert int(logs["longest_bad_row"]) == 1
    followed = {v.ref() for v in method.key_encoder.weights}
    for variable, old in zip([*method.weights, *method.optimizer.variables], before):
        may_change = (variable.ref() in followed or
                      any(word in variable.name for word in ("moving", "bad_", "good_", "iteration", "learning_rate")))
        assert may_change or np.array_equal(variable, old), variable.name
        assert variable.dtype.is_integer or np.isfinite(variable).all(), variable.name
    assert math.isfinite(float(step(batch(2))["loss"]))


@pytest.mark.parametrize("family", SLOW_RESNET)
def test_the_whole_step_compiles_and_agrees(family):
    """Through `fit`, as a run with jit_compile does it."""
    class Losses(keras.callbacks.Callback):
        def on_train_batch_end(self, index, logs):
            losses[-1].append(logs["loss"])

    views = {name: tf.concat([batch(step)[name] for step in range(3)], axis=0) for name in batch()}
    losses = []
    for jit in (False, True):
        losses.append([])
        method = build_method(tiny_config(family, jit_compile=jit), steps_per_epoch=10)
        method.fit(tf.data.Dataset.from_tensor_slices(views).batch(8, drop_remainder=True), verbose=0,
                   callbacks=[Losses()])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-5)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)    # a gate may have flipped by then


@pytest.mark.parametrize("family, policy", [("resnet", "mixed_bfloat16"), ("vit", "mixed_float16")])
def test_half_precision_trains_with_float32_losses(family, policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        method = build_method(tiny_config(family), steps_per_epoch=10)
        views = {name: tf.cast(view, method.encoder.compute_dtype) for name, view in batch().items()}
        logs = tf.function(method.train_step)(views)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert method.encoder.output.dtype == method.predictor.output.dtype == logs["loss"].dtype == tf.float32
    assert int(logs["bad_steps"]) == 0
    np.testing.assert_allclose(logs["loss"], method.chance_loss(8), rtol=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(family, tmp_path):
    """Weights, both kinds of statistics, optimizer, schedules of learning rate and momentum, bit for bit."""
    config = tiny_config(family, **{
        "batch_size": 1000, "epochs": 1, "checkpoint.every_steps": 5, "log.every_steps": 1, "log.tensorboard": False,
        "monitor.bank": 300, "monitor.queries": 100})
    pretrain(config, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for path in (tmp_path / "killed" / "checkpoints").glob("step-10.*"):
        path.unlink()
    pretrain(config, str(tmp_path / "killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
