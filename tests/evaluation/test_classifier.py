"""Linear probe and fine-tuning: the golden probe through the training step, and what stays frozen or moves."""

import numpy as np
import pytest
import tensorflow as tf

from golden import replay, weights
from moco_tf.errors import UsageError
from moco_tf.evaluation.classifier import FineTuning, LinearProbe
from moco_tf.normalization import BatchNorm
from moco_tf.optim.sgd import SGD

keras = tf.keras
RNG = np.random.default_rng(0)


def compiled(method, optimizer, width):
    method.build_on(width)
    method.compile(optimizer)
    method.optimizer.build(method.trainable_weights)
    return method


def small_backbone():
    images = keras.Input((8, 8, 3))
    x = BatchNorm(name="bn")(keras.layers.Conv2D(5, 3, name="conv")(images))
    return keras.Model(images, keras.layers.GlobalAveragePooling2D(name="features")(keras.layers.ReLU()(x)))


def batch(size=12, classes=4):
    return {"image": tf.constant(RNG.normal(size=(size, 8, 8, 3)), tf.float32),
            "label": tf.constant(RNG.integers(0, classes, size)), "weight": tf.ones([size])}


@pytest.mark.parametrize(**replay.cases("linear_probe"))
def test_the_probe_trains_as_the_reference_does(run, tag):
    """nn.Linear with SGD on scikit-learn's digits: every loss, accuracy, bias and weight norm of twenty steps."""
    settings, data = run.settings, run.settings["data"]
    rows = run.file[data["x"]].astype(np.float64) / data["divide_by"]
    if data["l2_normalize"]:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows, labels = rows.astype(np.float32).astype(replay.DTYPES[tag]), run.file[data["y"]].astype(np.int64)
    initial = (settings["weight_scale"] * weights.draw(settings["weight_init"])).astype(np.float32)
    with replay.precision(tag):
        identity = keras.Sequential([keras.layers.Flatten(input_shape=(1, 1, 64))])
        method = compiled(LinearProbe(identity, settings["classes"]),
                          SGD(settings["lr"][0], settings["optimizer"]["momentum"]), 64)
        method.classifier.kernel.assign(initial.T)
        step_of = tf.function(method.train_step)
        for step in range(settings["steps"]):
            here = slice(step * settings["batch_size"], (step + 1) * settings["batch_size"])
            results = step_of({"image": tf.constant(rows[here])[:, None, None, :], "label": tf.constant(labels[here]),
                               "weight": tf.ones([settings["batch_size"]])})
            for name, value in (("loss", results["loss"]), ("bias", method.classifier.bias),
                                ("w_norm", tf.norm(method.classifier.kernel))):
                replay.check(run, tag, value, run[f"{tag}/{name}"][step], f"{name} of step {step}")
            np.testing.assert_allclose(results["accuracy"], run[f"{tag}/acc"][step], atol=1e-6)
        replay.check(run, tag, method.classifier.kernel.numpy().T, run[f"{tag}/weight_final"], "weight_final")
        logits = method.classify(tf.constant(rows[slice(*settings["rest_rows"])]), training=False).numpy()
    wanted = labels[slice(*settings["rest_rows"])]
    np.testing.assert_allclose(np.mean(logits.argmax(1) == wanted), run[f"{tag}/rest_acc"], atol=1e-9)


def test_a_probe_leaves_its_backbone_alone():
    method = compiled(LinearProbe(small_backbone(), 4), SGD(0.1), 5)
    before = [value.copy() for value in method.encoder.get_weights()]
    kernel = method.classifier.kernel.numpy()
    for _ in range(3):
        method.train_step(batch())
    for value, old in zip(method.encoder.get_weights(), before):    # the moving statistics too
        assert value.tobytes() == old.tobytes()
    assert not np.array_equal(method.classifier.kernel, kernel)


def test_rows_of_weight_zero_do_not_count():
    """A batch filled up with any rows trains as the mean over its real ones, by the gradient written out in NumPy."""
    method = compiled(LinearProbe(small_backbone(), 4), SGD(1.0, momentum=0.0), 5)
    views = batch(8)
    views["weight"] = tf.constant([8 / 5] * 5 + [0.0] * 3)
    features = method.encoder(views["image"], training=False).numpy()[:5].astype(np.float64)
    kernel = method.classifier.kernel.numpy().astype(np.float64)
    scores = np.exp(features @ kernel)
    scores /= scores.sum(1, keepdims=True)
    results = method.train_step(views)
    right = np.eye(4)[views["label"].numpy()[:5]]
    np.testing.assert_allclose(method.classifier.kernel, kernel - features.T @ (scores - right) / 5, atol=1e-6)
    np.testing.assert_allclose(results["loss"], -np.mean(np.log((scores * right).sum(1))), rtol=1e-5)


def test_batch_norm_of_a_probe_has_no_parameters():
    method = compiled(LinearProbe(small_backbone(), 4, batch_norm=True), SGD(0.1), 5)
    assert len(method.trainable_weights) == 2
    before = method.batch_norm.moving_mean.numpy()
    method.train_step(batch())
    assert not np.array_equal(method.batch_norm.moving_mean, before)


def test_fine_tuning_moves_everything_and_learns():
    keras.utils.set_random_seed(0)
    method = compiled(FineTuning(small_backbone(), 4), SGD(0.5), 5)
    before = [value.copy() for value in method.get_weights()]
    views = batch()
    losses = [float(method.train_step(views)["loss"]) for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    assert abs(losses[0] - np.log(4)) < 0.05
    names = [v.name for v in method.trainable_weights]
    assert len(names) == 6 and all(
        not np.array_equal(v, old) for v, old in zip(method.weights, before) if v.trainable and "scale" not in v.name)


def test_the_average_of_the_weights_follows_them():
    method = compiled(FineTuning(small_backbone(), 4, average=0.9), SGD(0.5), 5)
    expected = method.network.get_weights()
    for _ in range(3):
        method.train_step(batch())
        expected = [0.9 * old + 0.1 * new for old, new in zip(expected, method.network.get_weights())]
    assert len(expected) == 8    # BatchNorm's statistics too: the average makes none of its own
    for copy, value in zip(method.averaged.get_weights(), expected):
        np.testing.assert_allclose(copy, value, atol=1e-6)


def test_fine_tuning_trains_what_was_frozen_before():
    backbone = small_backbone()
    backbone.trainable = False
    assert len(compiled(FineTuning(backbone, 4), SGD(0.1), 5).trainable_weights) == 6


def test_mixture_and_erasing_are_drawn_anew_each_step():
    method = compiled(FineTuning(small_backbone(), 4, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.5), SGD(0.0), 5)
    step, views = tf.function(method.train_step), batch()
    losses = [float(step(views)["loss"]) for _ in range(4)]    # learning rate 0: only the draws differ
    assert len(set(losses)) == 4


def test_an_odd_batch_cannot_be_mixed():
    method = compiled(FineTuning(small_backbone(), 4, mixup=0.8), SGD(0.1), 5)
    with pytest.raises((ValueError, UsageError), match="even"):
        method.train_step(batch(7))


def test_a_classifier_compiles_with_xla():
    method = compiled(FineTuning(small_backbone(), 4, mixup=0.8, cutmix=1.0, erasing=0.25), SGD(0.1), 5)
    results = tf.function(method.train_step, jit_compile=True)(batch())
    assert np.isfinite(results["loss"])
