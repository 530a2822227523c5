"""The name table, checkpoints and layouts, without PyTorch; files and PyTorch's own networks: test_torch_files.py."""

import pickle
import sys

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones.resnet import resnet
from moco_tf.errors import DataError, UsageError
from moco_tf.export import torch_weights
from moco_tf.export.torch_weights import Checkpoint
from moco_tf.heads import encoder, linear, mlp
from moco_tf.methods.moco import MoCo

keras = tf.keras


def small_encoder(head=linear, dim=8, **arguments):
    backbone = resnet(**{**dict(depth=18, width=0.125, size=32), **arguments})
    return encoder(backbone, lambda features: head(features, dim=dim))


def small_method(queue_size=24, **arguments):
    method = MoCo(small_encoder(**arguments), dim=8, queue_size=queue_size, temperature=0.2, momentum=0.9)
    random = np.random.default_rng(0)
    for variable in method.encoder.weights + method.key_encoder.weights:    # no two alike, or a mix-up would not show
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    method.queue.pointer.assign(16)
    return method


def equal(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_names_and_shapes_are_pytorchs():
    state = torch_weights.state_dict(encoder(resnet(depth=18, size=32), mlp))
    shapes = {name: value.shape for name, value in state.items()}
    assert len(shapes) == 20 + 20 * 5 + 4
    some = {"conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "bn1.num_batches_tracked": (),
            "fc.0.weight": (512, 512), "fc.2.weight": (128, 512), "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer4.1.bn2.bias": (512,)}
    assert {name: shapes[name] for name in some} == some
    assert state["bn1.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("head, per_encoder", [(linear, 320), (mlp, 322)])
def test_the_official_layout_of_a_resnet50_has_as_many_names_as_the_released_files(head, per_encoder):
    method = MoCo(small_encoder(head, depth=50), dim=8, queue_size=24, temperature=0.2, momentum=0.9)
    names = torch_weights.official(torch_weights.checkpoint_of(method))
    assert len(names) == 2 * per_encoder + 2
    assert names["module.queue"].shape == (8, 24) and names["module.queue_ptr"].shape == (1,)


def test_kernels_are_transposed_by_meaning():
    """A convolution and a dense layer computed from PyTorch's weights by PyTorch's formulas."""
    images = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(5, (2, 3), use_bias=False, name="conv")(images)
    model = keras.Model(images, keras.layers.Dense(6, name="fc")(keras.layers.GlobalAveragePooling2D()(x)))
    random = np.random.default_rng(0)
    state = {"conv.weight": random.normal(size=(5, 3, 2, 3)), "fc.weight": random.normal(size=(6, 5)),
             "fc.bias": random.normal(size=6)}
    torch_weights.load_into(model, state)
    image = random.normal(size=(3, 4, 4))    # channels first
    conv = np.array([[[(kernel * image[:, i:i + 2, j:j + 3]).sum() for j in range(2)] for i in range(3)]
                     for kernel in state["conv.weight"]])
    expected = state["fc.weight"] @ conv.mean((1, 2)) + state["fc.bias"]
    output = model(image.transpose(1, 2, 0)[None].astype(np.float32))[0]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_project_to_official_layout_and_back_is_bit_identical():
    source, target = small_method(), small_method()
    for variable in target.variables:
        variable.assign(tf.zeros_like(variable))
    state = torch_weights.official(torch_weights.checkpoint_of(source))
    torch_weights.restore(target, torch_weights.parse(state))
    for part in ("encoder", "key_encoder", "queue"):
        for ours, theirs in zip(getattr(target, part).variables, getattr(source, part).variables):
            np.testing.assert_array_equal(ours, theirs, err_msg=ours.name)
    equal(torch_weights.official(torch_weights.checkpoint_of(target)), state)


def test_a_file_without_momentum_encoder_and_queue_is_enough():
    source, target = small_method(), small_method()
    queue = target.queue.keys.numpy()
    checkpoint = torch_weights.checkpoint_of(source)._replace(key_encoder={}, queue=None)
    torch_weights.restore(target, torch_weights.parse(torch_weights.official(checkpoint)))
    for ours in (target.encoder, target.key_encoder):
        equal(torch_weights.state_dict(ours), torch_weights.state_dict(source.encoder))
    np.testing.assert_array_equal(target.queue.keys, queue)


def test_the_counter_of_batches_is_the_step():
    method = small_method()
    method.compile(optimizer="sgd")
    method.optimizer.iterations.assign(7)
    state = torch_weights.official(torch_weights.checkpoint_of(method))
    assert state["module.encoder_k.layer1.0.bn2.num_batches_tracked"] == 7


@pytest.mark.parametrize("arguments, message", [
    (dict(width=0.25), r"of another shape: conv1.weight \(8, 3, 7, 7\), not \(16, 3, 7, 7\)"),
    (dict(depth=34), r"missing: layer1.2.conv1.weight"),
    (dict(head=mlp), r"missing: fc.0.weight.*unexpected: fc.weight")])
def test_another_architecture_is_refused_and_nothing_changes(arguments, message):
    checkpoint = torch_weights.checkpoint_of(small_method())
    target = small_method(**arguments)
    before = [variable.numpy() for variable in target.variables]
    with pytest.raises(DataError, match=message):
        torch_weights.restore(target, checkpoint)
    for variable, value in zip(target.variables, before):
        np.testing.assert_array_equal(variable, value)


def test_a_broken_key_encoder_leaves_the_encoder_as_it_was():
    target = small_method()
    checkpoint = torch_weights.checkpoint_of(small_method())
    del checkpoint.key_encoder["fc.bias"]
    target.encoder.get_layer("fc").bias.assign(np.full(8, 5.0))
    with pytest.raises(DataError, match="1 missing: fc.bias"):
        torch_weights.restore(target, checkpoint)
    np.testing.assert_array_equal(target.encoder.get_layer("fc").bias, np.full(8, 5.0))


def test_another_queue_is_refused():
    with pytest.raises(DataError, match=r"\(32, 8\). Received: \(24, 8\)"):
        torch_weights.restore(small_method(queue_size=32), torch_weights.checkpoint_of(small_method()))


def test_a_report_says_what_became_of_every_name():
    model = small_encoder()
    state = torch_weights.state_dict(model)
    state["extra.weight"], state["fc.weight"] = np.zeros(3), np.zeros((4, 4))
    del state["bn1.bias"]
    report = torch_weights.load_into(model, state, strict=False)
    assert (report.missing, report.unexpected) == (["bn1.bias"], ["extra.weight"])
    assert report.misshapen == [("fc.weight", (8, 64), (4, 4))]
    assert len(report.matched) == len(model.weights) - 2
    table = report.table().splitlines()
    assert len(table) == len(model.weights) + 1
    assert [line.split()[0] for line in table[-3:]] == ["missing", "unexpected", "wrong"]
    assert "fc.weight: model (8, 64), file (4, 4)" in table[-1]


def test_what_is_not_strict_assigns_what_fits():
    model = small_encoder()
    torch_weights.load_into(model, {"bn1.weight": np.full(8, 3.0)}, strict=False)
    np.testing.assert_array_equal(model.get_layer("bn1").gamma, np.full(8, 3.0))


def probe(prefix="module."):
    model = small_encoder(dim=10)
    return torch_weights.parse({prefix + name: value for name, value in torch_weights.state_dict(model).items()})


def test_kinds_are_told_apart():
    method = small_method()
    backbone = keras.Model(method.encoder.input, method.encoder.get_layer("features").output)
    assert torch_weights.parse(torch_weights.official(torch_weights.checkpoint_of(method))).kind == "pretraining"
    assert torch_weights.parse(torch_weights.state_dict(backbone)).kind == "backbone"
    assert probe("module.").kind == probe("").kind == "probe"


def test_a_probe_is_refused_unless_allowed():
    method = small_method()
    backbone = resnet(depth=18, width=0.125, size=32)
    with pytest.raises(DataError, match="classifier.*backbone only"):
        torch_weights.restore(method, probe())
    with pytest.raises(DataError, match="classifier.*allow a probe"):
        torch_weights.load_backbone(backbone, probe())
    torch_weights.load_backbone(backbone, probe(), allow_probe=True)


def test_starting_from_a_backbone_leaves_heads_and_queue():
    method, checkpoint = small_method(), probe()
    head, queue = method.encoder.get_layer("fc").get_weights(), method.queue.keys.numpy()
    torch_weights.restore(method, checkpoint, backbone_only=True)
    for model in (method.encoder, method.key_encoder):
        np.testing.assert_array_equal(model.get_layer("conv1").kernel.numpy().transpose(3, 2, 0, 1),
                                      checkpoint.encoder["conv1.weight"])
    np.testing.assert_array_equal(method.encoder.get_layer("fc").get_weights()[0], head[0])
    np.testing.assert_array_equal(method.queue.keys, queue)


@pytest.mark.parametrize("names, message", [
    (["module.base_encoder.conv1.weight"], "MoCo v3"), (["encoder.module.l_to_ab.conv1.weight"], "CMC"),
    (["cls_token"], "vision transformer"),
    (["a", "b"], "2 names such as a, b")])
def test_other_models_are_named(names, message):
    with pytest.raises(DataError, match=message):
        torch_weights.parse({name: np.zeros(1) for name in names})


@pytest.mark.parametrize("arguments", [
    dict(depth=18, width=0.25), dict(depth=34, width=2), dict(depth=50), dict(depth=101, width=0.5),
    dict(depth=50, groups=32, width_per_group=4), dict(depth=50, groups=32, width_per_group=8), dict(depth=50, width=2),
    dict(depth=50, width_per_group=128), dict(depth=18, stem="cifar", channels=1)])
def test_the_architecture_is_read_off_the_shapes(arguments):
    with tf.Graph().as_default():
        shapes = torch_weights.named_shapes(resnet(**arguments))
    state = {name: np.broadcast_to(0, shape) for name, shape in shapes.items()}
    full = dict(width=1, groups=1, width_per_group=64, stem="imagenet", channels=3)
    assert torch_weights.architecture(state) == {"backbone": {**full, **arguments}, "head": None}


def test_the_head_is_read_off_the_shapes():
    def deep(features, dim):
        return mlp(features, dim, hidden_dim=(32, 32, 16, 16, 16, 16))    # fc.10 and fc.12 must come after fc.2

    heads = [torch_weights.architecture(torch_weights.state_dict(small_encoder(head)))["head"]
             for head in (linear, mlp, deep)]
    assert heads == [dict(name="linear", dim=8), dict(name="mlp", dim=8, hidden_dim=64),
                     dict(name="mlp", dim=8, hidden_dim=(32, 32, 16, 16, 16, 16))]


def test_the_official_layout_is_for_pretraining_only(tmp_path):
    with pytest.raises(UsageError, match="pre-training.*classifier"):
        torch_weights.write(str(tmp_path / "w.pth"), probe(), "official")


def test_a_checkpoint_fits_the_model_that_it_is_of():
    for checkpoint in (torch_weights.checkpoint_of(small_method(head=mlp)), probe()):
        report = torch_weights.fit(checkpoint)
        assert report.complete and set(report.matched) == {name for name in checkpoint.encoder if "num_b" not in name}
    del checkpoint.encoder["bn1.weight"]
    assert torch_weights.fit(checkpoint).missing == ["bn1.weight"]


def test_a_description_names_kind_encoder_and_queue():
    sentence = torch_weights.describe(torch_weights.checkpoint_of(small_method()))
    for part in ("pre-training", "depth=18", "width=0.125", "name=linear, dim=8", "momentum encoder", "24 keys"):
        assert part in sentence


def test_no_resnet_has_no_architecture():
    with pytest.raises(DataError, match="ResNet-18, 34, 50"):
        torch_weights.architecture({"conv1.weight": np.zeros((64, 3, 11, 11))})


def test_detectron2_names_and_file(tmp_path):
    checkpoint = torch_weights.checkpoint_of(small_method(depth=50))
    path = str(tmp_path / "weights.pkl")
    torch_weights.write(path, checkpoint, "detectron2")
    with open(path, "rb") as file:
        content = pickle.load(file)
    assert (content["__author__"], content["matching_heuristics"]) == ("MOCO", True)
    model = content["model"]
    for theirs, ours in {
            "stem.conv1.weight": "conv1.weight", "stem.conv1.norm.running_var": "bn1.running_var",
            "res4.0.shortcut.norm.bias": "layer3.0.downsample.1.bias",
            "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
            "res5.2.conv3.norm.num_batches_tracked": "layer4.2.bn3.num_batches_tracked",
            "stem.fc.weight": "fc.weight"}.items():
        np.testing.assert_array_equal(model[theirs], checkpoint.encoder[ours])
    assert len(model) == len(checkpoint.encoder)


def test_torchvisions_layout_has_a_classifier_only_where_there_is_one():
    pretraining = torch_weights.torchvision(torch_weights.checkpoint_of(small_method()))
    assert not any(name.startswith("fc.") for name in pretraining)
    assert torch_weights.torchvision(probe())["fc.weight"].shape == (10, 64)


@pytest.mark.parametrize("path, layout, message", [
    ("w.pth", "keras", "official, torchvision, detectron2"), ("w.pkl", "torchvision", r"must end in \.pth"),
    ("w.pth", "detectron2", r"must end in \.pkl")])
def test_wrong_layouts_and_suffixes_are_refused(tmp_path, path, layout, message):
    with pytest.raises(UsageError, match=message):
        torch_weights.write(str(tmp_path / path), Checkpoint("backbone", {}, {}), layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["missing/w.pkl", "taken.pkl"])
def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path, path):
    checkpoint = torch_weights.checkpoint_of(small_method())
    (tmp_path / "taken.pkl").mkdir()
    with pytest.raises(DataError, match="writable"):
        torch_weights.write(str(tmp_path / path), checkpoint, "detectron2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.pkl"]


@pytest.mark.parametrize("name, package", [("w.pth", "torch"), ("w.safetensors", "safetensors")])
def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, name, package):
    path = tmp_path / name
    path.write_bytes(b"x")
    for module in ("torch", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install moco_tf\[torch\]"):
        torch_weights.read_state_dict(str(path))


def test_files_of_other_kinds_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.pth, \.pth\.tar"):
        torch_weights.read_state_dict(str(tmp_path / "weights.pkl"))
    with pytest.raises(DataError, match="must exist"):
        torch_weights.read_state_dict(str(tmp_path / "weights.pth"))
