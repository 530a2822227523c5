"""MoCo's step: where the loss starts, what a bad step leaves behind, NCE, symmetric and cross-branch losses in NumPy,
and that replicas and XLA agree."""

import math

import numpy as np
import pytest
import tensorflow as tf

import linear_methods
from linear_methods import cross_entropy, flat, kernel_of, unit_branches
from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.methods.moco import MoCo
from moco_tf.optim.sgd import SGD
from moco_tf.shuffling import key_permutation, positions
from moco_tf.train import build_method, check

keras = tf.keras


def tiny_config(**overrides):
    return configs.override(configs.load("smoke"), **{
        "batch_size": 8, "bn_group_size": 4, "views.size": 8, "method.queue_size": 64, "shuffle_bn": "none",
        **overrides})


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
    may_change = ("moving", "bad_", "good_", "iteration", "learning_rate")
    followed = {v.name for v in method.key_encoder.weights}
    assert all(name in followed or any(word in name for word in may_change) for name in changed)
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
        steps = [v.numpy() - b for v, b in zip(method.trainable_weights, before)]
        moved.append(math.sqrt(sum((step ** 2).sum() for step in steps)) / lr)
    assert norm > 1
    np.testing.assert_allclose(moved, [norm, 1.0], rtol=1e-3)


@pytest.mark.parametrize("shuffle", [pytest.param("input", marks=pytest.mark.slow), "cross_replica"])
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


# --- on one linear layer, in NumPy ---


def linear(branches=1, lr=0.1, **options):
    arguments = dict(dim=linear_methods.DIM, queue_size=20, temperature=0.2, momentum=0.9, shuffle_bn="none")
    return linear_methods.compiled(MoCo(linear_methods.linear_encoder(branches), **{**arguments, **options}), lr)


def rows_of(encoder, images, branches=1):
    return unit_branches(flat(images) @ kernel_of(encoder), branches)


def logits_of(query, positive, negatives):
    return np.concatenate([(query * positive).sum(axis=1, keepdims=True), query @ negatives.T], axis=1) / 0.2


def info_nce(query, positive, negatives):
    return cross_entropy(logits_of(query, positive, negatives), np.zeros(len(query), int)).mean()


@pytest.mark.parametrize("momentum", [1.0, 0.99])
def test_nce_follows_z(momentum):
    """Three steps of encoders that stay as they are, against the formulas of CMC's queue: P = exp(s/T) / Z, where Z
    starts as n times the mean of exp(s/T), for n images."""
    method = linear(lr=0.0, loss="nce", num_images=60, partition_momentum=momentum)
    queue, z = method.queue.keys.numpy().astype(np.float64), None
    for step in range(3):
        views = linear_methods.batch(step)
        query, = rows_of(method.encoder, views["query"])
        key, = rows_of(method.key_encoder, views["key"])
        scores = np.exp(logits_of(query, key, queue))
        estimate = 60 * scores.mean()
        z = estimate if z is None else momentum * z + (1 - momentum) * estimate
        probability, noise = scores / z, 20 / 60
        loss = -np.log(probability[:, 0] / (probability[:, 0] + noise + 1e-7)) \
            - np.log(noise / (probability[:, 1:] + noise + 1e-7)).sum(axis=1)
        logs = method.train_step(views)
        np.testing.assert_allclose(logs["loss"], loss.mean(), rtol=1e-5)
        np.testing.assert_allclose(method.criteria[0].partition, z, rtol=1e-5)
        np.testing.assert_allclose(logs["partition_ratio"], z / (60 * math.exp(1 / (2 * 16 * 0.2 ** 2))), rtol=1e-5)
        np.testing.assert_allclose(logs["positive_probability"], probability[:, 0].mean(), rtol=1e-5)
        queue[[(8 * step + i) % 20 for i in range(8)]] = key
    np.testing.assert_allclose(method.queue.keys, queue, atol=1e-6)


def test_z_is_in_the_checkpoint_and_a_bad_step_leaves_it(tmp_path):
    method, again = (linear(loss="nce", num_images=60, seed=seed) for seed in range(2))
    method.train_step(linear_methods.batch())
    tf.train.Checkpoint(again).read(tf.train.Checkpoint(method).write(str(tmp_path / "saved"))).expect_partial()
    np.testing.assert_array_equal(again.queue.keys, method.queue.keys)
    assert float(again.criteria[0].partition) == float(method.criteria[0].partition) > 0
    views = linear_methods.batch(1)
    views["query"] = tf.tensor_scatter_nd_update(views["query"], [[0, 0, 0, 0]], [float("nan")])
    assert int(again.train_step(views)["bad_steps"]) == 1
    assert float(again.criteria[0].partition) == float(method.criteria[0].partition) > 0


@pytest.mark.parametrize("options, told", [
    (dict(loss="hinge"), "method.loss must be one of softmax, nce. Received: 'hinge'"),
    (dict(loss="nce"), "number of training images. Received: 0"),
    (dict(symmetric=True, shuffle_bn="input"), "Use shuffle_bn=cross_replica"),
    (dict(momentum=1.5), "from 0 to 1. Received: 1.5"), (dict(momentum=-0.1), "from 0 to 1. Received: -0.1"),
    (dict(temperature=0.0), "temperature .* must be above 0. Received: 0.0"),
    (dict(queue_size=0), "Received: queue_size 0")])
def test_settings_that_cannot_be_are_refused_in_one_line(options, told):
    with pytest.raises(UsageError, match=told) as refused:
        linear(**options)
    assert "\n" not in str(refused.value)


def test_a_symmetric_loss_has_both_views_as_queries_and_enqueues_the_keys_of_both():
    method, views = linear(symmetric=True), linear_methods.batch()
    queue = method.queue.keys.numpy().astype(np.float64)
    of_view = {name: rows_of(method.encoder, views[name])[0] for name in ("query", "key")}    # the twin's are the same
    expected = info_nce(of_view["query"], of_view["key"], queue) + info_nce(of_view["key"], of_view["query"], queue)
    logs = method.train_step(views)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(method.queue.keys[:8], of_view["query"], atol=1e-6)    # k1 before k2
    np.testing.assert_allclose(method.queue.keys[8:16], of_view["key"], atol=1e-6)
    np.testing.assert_array_equal(method.queue.keys[16:], queue[16:].astype(np.float32))
    assert int(method.queue.pointer) == 16
    assert method.chance_loss(8) == pytest.approx(2 * math.log(21))


def test_a_symmetric_step_needs_a_queue_of_two_batches():
    with pytest.raises(ValueError, match="queue size 15, global batch 16"):
        linear(symmetric=True, queue_size=15).train_step(linear_methods.batch())
    config = configs.override(configs.load("moco_r18_cifar10_unmix"), **{"batch_size": 64, "method.queue_size": 127})
    with pytest.raises(UsageError, match="queue_size 127, batch_size 64, each image with two keys.") as refused:
        check(config, size=50000, replicas=1, view_names=("query", "key"))
    assert "\n" not in str(refused.value)
    check(configs.override(config, **{"method.queue_size": 128}), size=50000, replicas=1, view_names=("query", "key"))


@pytest.mark.parametrize("branches", [2, 3])
def test_each_branchs_query_meets_the_keys_of_the_others(branches):
    method, views = linear(branches), linear_methods.batch()
    queues = np.split(method.queue.keys.numpy().astype(np.float64), branches, axis=1)
    query, key = (rows_of(method.encoder, views[name], branches) for name in ("query", "key"))
    pairs = [(i, j) for i in range(branches) for j in range(branches) if i != j]
    expected = sum(info_nce(query[i], key[j], queues[j]) for i, j in pairs)
    np.testing.assert_allclose(method.train_step(views)["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(method.queue.keys[:8], np.concatenate(key, axis=1), atol=1e-6)
    assert method.queue.keys.shape == (20, 16 * branches)
    assert method.chance_loss(8) == pytest.approx(len(pairs) * math.log(21))


VARIANTS = {
    "nce": dict(loss="nce", num_images=60, partition_momentum=0.9),
    "symmetric": dict(symmetric=True), "branches": dict(branches=2),
    "all": dict(branches=2, symmetric=True, loss="nce", num_images=60, shuffle_bn="cross_replica", bn_group_size=2)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_replicas_train_as_one(variant):
    linear_methods.assert_replicas_train_as_one(lambda: linear(**VARIANTS[variant]),
                                              lambda: [linear_methods.batch(step) for step in range(5)])


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_compiles_and_agrees(variant):
    linear_methods.assert_compiles_and_agrees(lambda: linear(**VARIANTS[variant]),
                                            [linear_methods.batch(step) for step in range(3)])


def test_the_mechanisms_differ_in_their_configs_only():
    """MoCo's comparison (arXiv:1911.05722, fig. 3): the same data, backbone, head, optimizer and schedule."""
    moco = configs.load("mechanism_moco_r50")
    others = {"mechanism_end_to_end_r50": {"batch_size"},    # whose number of negatives the batch is
              "mechanism_memory_bank_r50": {"shuffle_bn", "views.name"}}    # one view, and no second encoder
    for name, may_differ in others.items():
        differing = {line.split(":")[0] for line in configs.differences(moco, configs.load(name))}
        assert {key for key in differing if not key.startswith("method.")} == may_differ
