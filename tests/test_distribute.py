"""One, two and four replicas train as one: MoCo with shuffling BN in the pipeline and in the step, and MoCo v3 with
synchronised BN, a ResNet by LARS and a vision transformer by AdamW. And gathered rows send gradients back. All methods,
on one layer: tests/methods.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from conftest import ROOT
from linear_methods import strategy_of
from moco_tf.distribute import first_row, gather_rows


def trained(replicas, what, precision, folder):
    out = folder / f"{replicas}{what}{precision}.npz"
    subprocess.run([sys.executable, ROOT / "tests" / "replicas.py", str(replicas), what, precision, out], check=True,
                   timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return np.load(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(what, precision) -> what one replica has learned."""
    folder, known = tmp_path_factory.mktemp("one"), {}

    def learned(what, precision):
        if (what, precision) not in known:
            known[what, precision] = trained(1, what, precision, folder)
        return known[what, precision]

    return learned


def assert_equal(ours, expected, tolerance):
    assert sorted(ours.files) == sorted(expected.files)
    for name in ours.files:
        value, wanted = with_gradient(name, ours[name]), with_gradient(name, expected[name])
        scale = np.abs(wanted).max(initial=1e-3)
        np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance * scale, err_msg=name)


def with_gradient(name, value):
    """What of a weight has a gradient: adding the same to all keys of an attention, or to all inputs of a linear layer
    before BatchNorm, changes nothing, and AdamW makes whole steps of the rounding that is left of such gradients."""
    if name.endswith("attn.qkv/bias:0"):
        return np.delete(value, range(len(value) // 3, 2 * len(value) // 3))    # without the keys' third
    return value[:0] if name.endswith(" norm/beta:0") else value


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("replicas, what", [
    slow(2, "input"), (4, "input"), (2, "cross_replica"), slow(4, "cross_replica"), slow(1, "cross_replica"),
    slow(2, "v3_resnet"), slow(4, "v3_resnet"), slow(2, "v3_vit"), (4, "v3_vit")])
def test_replicas_train_as_one(replicas, what, alone, tmp_path):
    """Losses, weights, statistics, memory and optimizer after five steps. In float64, where nothing but a difference of
    the mathematics can show; 1e-5 with room to spare."""
    one = alone("input" if what == "cross_replica" else what, "float64")
    assert_equal(trained(replicas, what, "float64", tmp_path), one, 1e-9)


@pytest.mark.parametrize("replicas, what", [slow(2, "input"), (4, "input"), slow(2, "v3_resnet"), slow(4, "v3_resnet"),
                                            slow(2, "v3_vit"), slow(4, "v3_vit")])
def test_the_losses_of_replicas_are_those_of_one_in_float32(replicas, what, alone, tmp_path):
    """At published learning rates. At larger ones a ReLU near 0 sooner falls to the other side, and rounding grows."""
    ours = trained(replicas, what, "float32", tmp_path)["losses"][:, 0]
    np.testing.assert_allclose(ours, alone(what, "float32")["losses"][:, 0], rtol=1e-5)


PICKED = {"dense": [0, 1, 2, 3], "sparse": [3, 0, 0, 2]}    # by tf.gather, whose gradients are sparse


@pytest.mark.parametrize("kind", PICKED)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_gathered_row_has_the_gradients_of_all_replicas(replicas, kind):
    """Replica r weights what it picks of the gathered rows by r + 1; a row's gradient is the sum of these."""
    strategy, rows, share = strategy_of(replicas), np.arange(8.0).reshape(4, 2), 4 // replicas

    def pick(rows):
        return rows if kind == "dense" else tf.gather(rows, PICKED[kind])

    @tf.function
    def gradients():
        def here():
            first = first_row(share)
            own = tf.slice(tf.constant(rows), tf.stack([first, 0]), [share, 2])
            with tf.GradientTape() as tape:
                tape.watch(own)
                total = tf.reduce_sum(pick(gather_rows(own)) ** 2) * tf.cast(first // share + 1, tf.float64)
            return tf.convert_to_tensor(tape.gradient(total, own))

        return strategy.run(here)

    weight = replicas * (replicas + 1) / 2
    counts = np.bincount(PICKED[kind], minlength=4)
    ours = np.concatenate(strategy.experimental_local_results(gradients()))
    np.testing.assert_allclose(ours, weight * 2 * rows * counts[:, None])
