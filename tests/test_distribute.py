"""One, two and four replicas train as one, with shuffling BN in the pipeline and in the step."""

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT


def trained(replicas, shuffle, precision, folder):
    out = folder / f"{replicas}{shuffle}{precision}.npz"
    subprocess.run([sys.executable, ROOT / "tests" / "replicas.py", str(replicas), shuffle, precision, out], check=True,
                   timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return np.load(out)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """{precision: what one replica has learned}."""
    folder = tmp_path_factory.mktemp("one")
    return {precision: trained(1, "input", precision, folder) for precision in ("float64", "float32")}


def assert_equal(ours, expected, tolerance):
    assert sorted(ours.files) == sorted(expected.files)
    for name in ours.files:
        scale = np.abs(expected[name]).max(initial=1e-3)
        np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=tolerance * scale, err_msg=name)


@pytest.mark.parametrize("replicas, shuffle", [(2, "input"), (4, "input"), (2, "cross_replica"), (4, "cross_replica"),
                                               (1, "cross_replica")])
def test_replicas_train_as_one(replicas, shuffle, alone, tmp_path):
    """Losses, weights, statistics, queue and momentum buffers after five steps. In float64, where nothing but a
    difference of the mathematics can show; 1e-5 with room to spare."""
    assert_equal(trained(replicas, shuffle, "float64", tmp_path), alone["float64"], 1e-9)


@pytest.mark.parametrize("replicas", [2, 4])
def test_the_losses_of_replicas_are_those_of_one_in_float32(replicas, alone, tmp_path):
    """At MoCo's learning rate. At larger ones a ReLU near 0 sooner falls to the other side, and rounding grows."""
    ours = trained(replicas, "input", "float32", tmp_path)["losses"][:, 0]
    np.testing.assert_allclose(ours, alone["float32"]["losses"][:, 0], rtol=1e-5)
