"""`moco-tf convert`: round trips between workdirs and files, and files that are not what they should be."""

import os
import pickle

import numpy as np
import pytest

from conftest import moco_tf
from moco_tf import config as configs
from moco_tf.callbacks import Checkpoints
from moco_tf.errors import DataError, UsageError
from moco_tf.export import exchange as module
from moco_tf.export.exchange import exchange
from moco_tf.train import build_method, open_workdir, restore_method

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run whose weights, statistics and queue are all different from the initial ones."""
    path = str(tmp_path_factory.mktemp("runs") / "run")
    config = configs.load("smoke")
    method = build_method(config, steps_per_epoch=10)
    rng = np.random.default_rng(0)
    for model in (method.encoder, method.key_encoder):
        model.set_weights([np.abs(w + 0.1 * rng.normal(size=w.shape)) for w in model.get_weights()])
    method.queue.pointer.assign(77)
    method.optimizer.iterations.assign(5)
    open_workdir(config, path)
    Checkpoints(method, f"{path}/checkpoints").save(5)
    return path


def contents(path):
    method, _, _ = restore_method(path)
    return [*method.encoder.get_weights(), *method.key_encoder.get_weights(), method.queue.keys.numpy(),
            method.queue.pointer.numpy()]


@pytest.mark.parametrize("name", ["moco.pth.tar", "moco.safetensors"])
def test_workdir_to_official_layout_to_workdir_is_bit_identical(workdir, tmp_path, name, capsys):
    exchange(workdir, str(tmp_path / name), "official")
    exchange(str(tmp_path / name), str(tmp_path / "imported"))
    printed = capsys.readouterr().out
    assert "matched" in printed and "queue of 1024 keys" in printed and "momentum encoder" in printed
    for ours, theirs in zip(contents(str(tmp_path / "imported")), contents(workdir)):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_the_layouts_of_others_are_written(workdir, tmp_path):
    exchange(workdir, str(tmp_path / "resnet.safetensors"), "torchvision")
    exchange(workdir, str(tmp_path / "resnet.pkl"), "detectron2")
    with open(tmp_path / "resnet.pkl", "rb") as file:
        written = pickle.load(file)
    assert written["__author__"] == "MOCO" and written["matching_heuristics"] is True
    assert "stem.conv1.norm.running_var" in written["model"] and "res2.0.conv1.weight" in written["model"]


def test_a_backbone_starts_a_run_only_when_asked_for(workdir, tmp_path):
    source = str(tmp_path / "resnet.safetensors")
    exchange(workdir, source, "torchvision")
    with pytest.raises(DataError, match="--allow_probe"):
        exchange(source, str(tmp_path / "imported"))
    assert not os.path.exists(tmp_path / "imported")
    exchange(source, str(tmp_path / "imported"), allow_probe=True)
    method, _, _ = restore_method(str(tmp_path / "imported"))
    ours = {w.name: w.numpy() for w in method.encoder.weights}
    for weight in restore_method(workdir)[0].encoder.weights:
        if not weight.name.startswith("fc"):
            np.testing.assert_array_equal(ours[weight.name], weight.numpy())


def test_a_workdir_that_holds_a_run_is_not_overwritten(workdir, tmp_path):
    exchange(workdir, str(tmp_path / "moco.safetensors"))
    with pytest.raises(UsageError, match="new workdir"):
        exchange(str(tmp_path / "moco.safetensors"), workdir)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("damage", ["truncated", "another architecture", "malicious"])
def test_files_that_are_not_what_they_should_be_end_with_3_and_leave_nothing(workdir, tmp_path, damage):
    source = tmp_path / "moco.pth.tar"
    exchange(workdir, str(source))
    if damage == "truncated":
        source.write_bytes(source.read_bytes()[:5000])
    elif damage == "malicious":
        source.write_bytes(pickle.dumps({"state_dict": Malicious()}))
    else:
        import torch

        content = torch.load(source, weights_only=True)
        content["state_dict"]["module.encoder_q.layer2.0.conv1.weight"] = torch.zeros(3, 3)
        torch.save(content, source)
    done = moco_tf("convert", source, tmp_path / "imported", cwd=module.__file__.split("moco_tf/export")[0])
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.strip().splitlines()[-1].startswith("moco-tf: ")
    assert sorted(os.listdir(tmp_path)) == ["moco.pth.tar"]
    assert not os.path.exists("executed")
