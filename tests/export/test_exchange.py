"""`moco-tf convert`: round trips between workdirs and files, and files that are not what they should be."""

import os
import pickle

import numpy as np
import pytest
import tensorflow as tf

from conftest import moco_tf
from moco_tf import config as configs
from moco_tf.backbones import BACKBONES
from moco_tf.callbacks import Checkpoints
from moco_tf.errors import DataError, UsageError
from moco_tf.export import exchange as module
from moco_tf.export import torch_weights
from moco_tf.export.exchange import exchange
from moco_tf.heads import encoder, predictor, projector
from moco_tf.train import build_encoder, build_method, open_workdir, restore_method

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


V3 = {"moco_v3_vit_tiny_quickstart": dict(
          head=dict(name="projector", layers=3, hidden_dim=16, dim=8),
          predictor=dict(layers=2, hidden_dim=16, last_bn=True),
          backbone=dict(name="vit", dim=24, depth=2, heads=3, patch=7, freeze_patch=True)),
      "moco_v3_r18_quickstart": dict(
          head=dict(name="projector", layers=2, hidden_dim=16, dim=8),
          predictor=dict(layers=2, hidden_dim=16, last_bn=False),
          backbone=dict(name="resnet", depth=18, width=0.125, stem="cifar"))}


def v3_workdir(path, recipe):
    """Of a run of a small v3 model whose weights and statistics are all different from the initial ones."""
    config = configs.load(recipe)
    config.unlock()
    for section, values in V3[recipe].items():
        config[section] = values
    method = build_method(config.lock(), steps_per_epoch=10)
    rng = np.random.default_rng(0)
    for model in (method.encoder, method.key_encoder, method.predictor):
        model.set_weights([np.abs(w + 0.1 * rng.normal(size=w.shape)) for w in model.get_weights()])
    open_workdir(config, path)
    Checkpoints(method, f"{path}/checkpoints").save(5)
    return path


def v3_contents(path):
    method, config, _ = restore_method(path)
    assert config.method.name == "moco_v3" and config.bn_group_size == -1
    return [value for model in (method.encoder, method.key_encoder, method.predictor) for value in model.get_weights()]


@pytest.mark.parametrize("recipe, heads, name", [
    ("moco_v3_vit_tiny_quickstart", 3, "moco.pth.tar"), ("moco_v3_r18_quickstart", 0, "moco.safetensors")])
def test_a_v3_workdir_to_official_layout_to_workdir_is_bit_identical(tmp_path, recipe, heads, name, capsys):
    source = v3_workdir(str(tmp_path / "run"), recipe)
    exchange(source, str(tmp_path / name))
    exchange(str(tmp_path / name), str(tmp_path / "imported"), heads=heads)
    assert "pre-training checkpoint of MoCo v3" in capsys.readouterr().out
    for ours, theirs in zip(v3_contents(str(tmp_path / "imported")), v3_contents(source)):
        np.testing.assert_array_equal(ours, theirs)


def test_a_deit_file_starts_a_run_when_its_heads_are_told(tmp_path):
    source, target = v3_workdir(str(tmp_path / "run"), "moco_v3_vit_tiny_quickstart"), str(tmp_path / "deit.pth")
    exchange(source, target, "deit")
    with pytest.raises(DataError, match="width 24.*--heads"):
        exchange(target, str(tmp_path / "imported"), allow_probe=True)
    assert sorted(os.listdir(tmp_path)) == ["deit.pth", "run"]
    exchange(target, str(tmp_path / "imported"), allow_probe=True, heads=3)
    ours, theirs = (restore_method(path)[0] for path in (str(tmp_path / "imported"), source))
    for weight, expected in zip(ours.encoder.weights, theirs.encoder.weights):
        if not weight.name.startswith("fc"):
            np.testing.assert_array_equal(weight, expected, err_msg=weight.name)


@pytest.mark.parametrize("name, layers, size, recipe", [
    ("vit_small", 3, 224, "moco_v3_vit_small"), ("vit_base", 3, 96, "moco_v3_vit_base"),
    ("vit_conv_small", 3, 224, "moco_v3_vit_small"), ("resnet", 2, 224, "moco_v3_r50")])
def test_the_config_of_a_published_v3_model_is_its_recipe(name, layers, size, recipe):
    with tf.Graph().as_default():    # shapes, without memory
        model = encoder(BACKBONES[name](size=size), lambda features: projector(features, layers=layers))
        states = [{key: np.broadcast_to(0, shape) for key, shape in torch_weights.named_shapes(part).items()}
                  for part in (model, predictor(last_bn=name != "resnet"))]
        checkpoint = torch_weights.Checkpoint("pretraining", states[0], states[0], predictor=states[1],
                                              heads=0 if name == "resnet" else 12)
        config, expected = module.imported_config(checkpoint), configs.load(recipe)
        again = build_encoder(config)
        assert torch_weights.named_shapes(again) == torch_weights.named_shapes(model)
    assert config.views.size == size
    for section in ("head", "predictor", "method", "optimizer", "bn_group_size"):
        assert config[section] == expected[section]
    assert config.backbone.get("freeze_patch") == (None if name == "resnet" else True)


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
