"""The end-to-end mechanism: its loss and the gradients to both encoders in closed form, and that replicas, XLA and the
ways to shuffle agree."""

import math

import numpy as np
import pytest
import tensorflow as tf

from linear_methods import (DIM, assert_compiles_and_agrees, assert_replicas_train_as_one, batch, compiled,
                            cross_entropy, flat, kernel_of, linear_encoder, state, train, unit_branches)
from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.methods.end_to_end import EndToEnd
from moco_tf.shuffling import key_permutation, positions
from moco_tf.train import build_method

TEMPERATURE = 0.2
VARIANTS = {"two": {}, "shared": dict(shared=True), "branches": dict(branches=2),
            "shuffled": dict(shuffle_bn="cross_replica", bn_group_size=2)}
NORMALIZED = dict(VARIANTS["shuffled"], norm_group=2)    # too ill-conditioned for float32


def build(branches=1, lr=0.1, norm_group=0, **options):
    encoder = linear_encoder(branches, norm_group=norm_group)
    return compiled(EndToEnd(encoder, **{**dict(dim=DIM, temperature=TEMPERATURE, shuffle_bn="none"), **options}), lr)


def expected(method, views, branches=1):
    """(N,) losses, and the gradients of their mean by the kernels of queries and of keys."""
    images = [flat(views[name]) for name in ("query", "key")]
    rows = [view @ kernel_of(encoder) for view, encoder in zip(images, (method.encoder, method.key_encoder))]
    queries, keys = (unit_branches(its, branches) for its in rows)
    losses, count = 0.0, len(rows[0])
    upstream = [[np.zeros_like(part) for part in side] for side in (queries, keys)]
    for i in range(branches):
        for j in range(branches):
            if i != j or branches == 1:
                logits = queries[i] @ keys[j].T / TEMPERATURE
                losses = losses + cross_entropy(logits, np.arange(count))
                probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
                error = (probabilities - np.eye(count)) / (count * TEMPERATURE)
                upstream[0][i] += error @ keys[j]
                upstream[1][j] += error.T @ queries[i]
    gradients = []
    for view, raw, units, into in zip(images, rows, (queries, keys), upstream):
        norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in np.split(raw, branches, axis=1)]
        parts = [(g - u * (g * u).sum(axis=1, keepdims=True)) / norm for g, u, norm in zip(into, units, norms)]
        gradients.append(view.T @ np.concatenate(parts, axis=1))
    return losses, gradients


@pytest.mark.parametrize("branches", [1, 2])
def test_gradients_reach_both_encoders(branches):
    method, views = build(branches), batch()
    losses, gradients = expected(method, views, branches)
    before = [kernel_of(encoder) for encoder in (method.encoder, method.key_encoder)]
    logs = method.train_step(views)
    np.testing.assert_allclose(logs["loss"], losses.mean(), rtol=1e-5)
    for kernel, encoder, gradient in zip(before, (method.encoder, method.key_encoder), gradients):
        np.testing.assert_allclose(kernel_of(encoder), kernel - 0.1 * gradient, atol=1e-6)
        assert np.abs(gradient).max() > 0.01
    assert not np.allclose(*(kernel_of(encoder) for encoder in (method.encoder, method.key_encoder)))
    np.testing.assert_allclose(logs["gradient_norm"], math.sqrt(sum((its ** 2).sum() for its in gradients)), rtol=1e-5)


def test_one_shared_network_has_the_gradients_of_both():
    method, views = build(shared=True), batch()
    assert method.key_encoder is method.encoder and len(method.trainable_weights) == 1
    losses, (of_queries, of_keys) = expected(method, views)
    before = kernel_of(method.encoder)
    np.testing.assert_allclose(method.train_step(views)["loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(kernel_of(method.encoder), before - 0.1 * (of_queries + of_keys), atol=1e-6)


def test_both_encoders_start_alike_and_are_saved(tmp_path):
    method = build()
    np.testing.assert_array_equal(method.encoder.get_weights()[0], method.key_encoder.get_weights()[0])
    method.train_step(batch())
    path, again = tf.train.Checkpoint(method).write(str(tmp_path / "saved")), build()
    tf.train.Checkpoint(again).read(path).assert_existing_objects_matched()
    for ours, theirs in zip(again.weights, method.weights):
        np.testing.assert_array_equal(ours, theirs)


def test_the_negatives_are_the_other_keys_of_the_batch():
    """B - 1 of them: rows alike cost ln B, and random ones as much as their spread adds."""
    method = build()
    alike = {**batch(images=32), "query": tf.ones((32, 4, 4, 3)), "key": tf.ones((32, 4, 4, 3))}
    np.testing.assert_allclose(method.train_step(alike)["loss"], math.log(32), rtol=1e-5)
    assert method.chance_loss(32) == pytest.approx(math.log(32))
    assert build(branches=3).chance_loss(32) == pytest.approx(6 * math.log(32))
    rng = np.random.default_rng(0)
    noise = {**batch(images=256), **{name: tf.constant(rng.normal(size=(256, 4, 4, 3)), tf.float32)
                                     for name in ("query", "key")}}
    logs = compiled(EndToEnd(linear_encoder(dim=128), dim=128, temperature=0.2, shuffle_bn="none")).train_step(noise)
    # The 48 numbers of an image fill no more than 48 of the 128 dimensions, whose cosines have variance 1/48 or more.
    spread = 1 / (2 * 48 * 0.2 ** 2)
    assert math.log(256) < float(logs["loss"]) < math.log(256) + 1.6 * spread
    assert float(logs["accuracy"]) < 0.05


@pytest.mark.parametrize("options", [*VARIANTS.values(), NORMALIZED], ids=[*VARIANTS, "normalized"])
def test_replicas_train_as_one(options):
    """Through the keys that other replicas have encoded, too: the kernel of keys has its gradients from them alone."""
    assert_replicas_train_as_one(lambda: build(**options), lambda: [batch(step) for step in range(5)])


def test_keys_that_the_pipeline_has_dealt_anew_train_as_one():
    def shuffled():
        for step in range(5):
            views, order = batch(step), key_permutation(0, step, 8, 2)
            yield {**views, "key": tf.gather(views["key"], order), "key_position": positions(order)}

    assert_replicas_train_as_one(lambda: build(shuffle_bn="input", norm_group=2), lambda: list(shuffled()))


def test_all_ways_to_shuffle_pick_the_same_positives():
    """Without BatchNorm the order of keys is no matter."""
    trained = {}
    for shuffle in ("input", "cross_replica", "none"):
        batches = [batch(step) for step in range(3)]
        if shuffle == "input":
            orders = [key_permutation(0, step, 8, 4) for step in range(3)]
            batches = [{**views, "key": tf.gather(views["key"], order), "key_position": positions(order)}
                       for views, order in zip(batches, orders)]
        trained[shuffle] = train(lambda: build(shuffle_bn=shuffle, bn_group_size=4), batches)
    for name, value in trained["none"].items():
        for shuffle in ("input", "cross_replica"):
            np.testing.assert_allclose(trained[shuffle][name], value, rtol=1e-5, atol=1e-6, err_msg=f"{shuffle} {name}")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_step_compiles_and_agrees(variant):
    assert_compiles_and_agrees(lambda: build(**VARIANTS[variant]), [batch(step) for step in range(3)])


def test_a_non_finite_step_leaves_both_encoders():
    method, views = build(), batch()
    before = state(method)
    views["key"] = tf.tensor_scatter_nd_update(views["key"], [[0, 0, 0, 0]], [float("nan")])
    assert int(method.train_step(views)["bad_steps"]) == 1
    for name, value in state(method).items():
        assert "bad_" in name or "_bad" in name or "iteration" in name or np.array_equal(value, before[name]), name


def test_a_recipe_trains_both_networks_with_their_own_statistics():
    config = configs.override(configs.load("end_to_end_quickstart"), **{
        "batch_size": 8, "bn_group_size": 4, "views.size": 8, "backbone.width": 0.0625})
    method = build_method(config, steps_per_epoch=10)
    rng, before = np.random.default_rng(0), [variable.numpy() for variable in method.trainable_weights]
    views = {name: tf.constant(rng.normal(size=(8, 8, 8, 3)), tf.float32) for name in ("query", "key")}
    logs = tf.function(method.train_step, autograph=False)({**views, "key_position": tf.range(8)})
    assert len(before) == 2 * len(method.encoder.trainable_weights)
    assert int(logs["bad_steps"]) == 0 and float(logs["gradient_norm"]) > 0
    # No bias before BatchNorm is there to have no gradient: everything moves.
    assert all(not np.array_equal(variable, old) for variable, old in zip(method.trainable_weights, before))
    moving = [[weight.numpy() for weight in encoder.weights if "moving" in weight.name]
              for encoder in (method.encoder, method.key_encoder)]
    assert any(not np.array_equal(*pair) for pair in zip(*moving))


def test_a_temperature_that_cannot_divide_is_refused():
    with pytest.raises(UsageError, match="temperature .* above 0. Received: -1"):
        build(temperature=-1)
