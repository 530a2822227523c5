"""Files that PyTorch and safetensors write and read, and PyTorch's own networks. Needs the extra `torch`."""

import argparse
import os
import pickle
import re
import resource
import signal
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
import torch

from moco_tf.backbones.resnet import BLOCKS, resnet
from moco_tf.backbones.vit import vit
from moco_tf.errors import DataError
from moco_tf.export import torch_weights
from moco_tf.export.exchange import exchange
from moco_tf.export.torch_files import read_state_dict
from moco_tf.heads import encoder, linear, mlp, predictor, projector
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3
from twins import ResNet, spread

pytestmark = pytest.mark.torch


def network(depth, **arguments):
    model = ResNet("basic" if depth < 50 else "bottleneck", BLOCKS[depth], **arguments)
    spread(model)
    return model


class Official(torch.nn.Module):
    """The attributes of facebookresearch/moco's MoCo."""

    def __init__(self, depth, dim, queue_size, hidden):
        super().__init__()
        for name in ("encoder_q", "encoder_k"):
            encoder = network(depth, num_classes=dim)
            if hidden:
                width = encoder.fc.in_features
                encoder.fc = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), encoder.fc)
            setattr(self, name, encoder)
        self.register_buffer("queue", torch.randn(dim, queue_size))
        self.register_buffer("queue_ptr", torch.full((1,), 4, dtype=torch.long))


class TransformerBlock(torch.nn.Module):
    """A pre-norm block with the attributes of timm's."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (torch.nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = torch.nn.ModuleDict({"qkv": torch.nn.Linear(dim, 3 * dim), "proj": torch.nn.Linear(dim, dim)})
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(dim, 4 * dim), "fc2": torch.nn.Linear(4 * dim, dim)})

    def forward(self, x):
        batch, tokens, dim = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(batch, tokens, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        x = x + self.attn["proj"](attended)
        return x + self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))


class VisionTransformer(torch.nn.Module):
    """The network of the papers, called like timm's; `stem`: "patch" or MoCo v3's "conv"."""

    def __init__(self, dim, depth, heads, patch=16, size=64, stem="patch", head=None):
        super().__init__()
        self.cls_token = torch.nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, dim))
        self.patch_embed = torch.nn.Module()
        if stem == "patch":
            self.patch_embed.proj = torch.nn.Conv2d(3, dim, patch, patch)
        else:
            widths = [3, dim // 8, dim // 4, dim // 2, dim]
            parts = [part for inputs, outputs in zip(widths, widths[1:]) for part in (
                torch.nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), torch.nn.BatchNorm2d(outputs), torch.nn.ReLU())]
            self.patch_embed.proj = torch.nn.Sequential(*parts, torch.nn.Conv2d(dim, dim, 1))
        self.blocks = torch.nn.Sequential(*(TransformerBlock(dim, heads) for _ in range(depth)))
        self.norm = torch.nn.LayerNorm(dim, eps=1e-6)
        if head:
            self.head = head

    def forward(self, x):
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self.pos_embed
        x = self.norm(self.blocks(x))[:, 0]
        return self.head(x) if hasattr(self, "head") else x


def normalized_mlp(widths, last_norm=True):
    """Linear layers without bias, BatchNorm behind each, the last one's without weight and bias."""
    parts = []
    for i, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        parts.append(torch.nn.Linear(inputs, outputs, bias=False))
        parts += [torch.nn.BatchNorm1d(outputs, affine=not last)] if last_norm or not last else []
        parts += [] if last else [torch.nn.ReLU()]
    return torch.nn.Sequential(*parts)


class OfficialV3(torch.nn.Module):
    """The attributes of facebookresearch/moco-v3's models, on a small transformer or a ResNet-18."""

    def __init__(self, family):
        super().__init__()
        for name in ("base_encoder", "momentum_encoder"):
            if family == "resnet":
                encoder = network(18)
                encoder.fc = normalized_mlp([512, 32, 16])
            else:
                encoder = VisionTransformer(48, 2, 3, stem=family, head=normalized_mlp([48, 32, 32, 16]))
            setattr(self, name, encoder)
        self.predictor = normalized_mlp([16, 32, 16], last_norm=family != "resnet")
        spread(self)


def method_v3(family):
    if family == "resnet":
        backbone, layers = resnet(depth=18, size=64), 2
    else:
        backbone, layers = vit(dim=48, depth=2, heads=3, size=64, stem=family), 3
    return MoCoV3(encoder(backbone, lambda x: projector(x, layers=layers, hidden_dim=32, dim=16)),
                  predictor(dim=16, hidden_dim=32, last_bn=family != "resnet"), temperature=0.2, momentum=0.9)


def method(depth=18, head=linear, size=64):
    backbone = resnet(depth=depth, size=size)
    return MoCo(encoder(backbone, lambda features: head(features, dim=16)), dim=16, queue_size=8, temperature=0.2,
                momentum=0.9)


def save(path, module, legacy=False):
    state = {f"module.{name}": value for name, value in module.state_dict().items()}
    torch.save({"epoch": 3, "arch": "resnet18", "state_dict": state, "optimizer": {"state": {0: torch.ones(2)}}},
               path, _use_new_zipfile_serialization=not legacy)
    return str(path)


@pytest.mark.parametrize("depth, arguments", [(18, {}), (50, {}), (50, dict(groups=32, width_per_group=4))])
def test_our_weights_load_strictly_into_pytorch_and_compute_the_same(tmp_path, depth, arguments):
    ours, theirs = resnet(depth=depth, size=64, **arguments), network(depth, **arguments)
    theirs.fc = torch.nn.Identity()
    source = network(depth, **arguments).state_dict()
    torch_weights.load_into(ours, {name: value.numpy() for name, value in source.items() if not name.startswith("fc.")})
    path = str(tmp_path / "weights.pth")
    torch_weights.write(path, torch_weights.parse(torch_weights.state_dict(ours)), "torchvision")
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(ours(images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("head", [linear, mlp])
@pytest.mark.parametrize("legacy", [False, True])
def test_official_files_come_in_and_go_out(tmp_path, head, legacy):
    torch.manual_seed(0)
    theirs = Official(18, 16, 8, hidden=head is mlp)
    ours = method(head=head)
    source = save(tmp_path / "in.pth.tar", theirs, legacy)
    torch_weights.restore(ours, torch_weights.parse(read_state_dict(source)))
    np.testing.assert_array_equal(ours.queue.keys, theirs.queue.numpy().T)
    assert int(ours.queue.pointer) == 4

    target = str(tmp_path / "out.pth.tar")
    torch_weights.write(target, torch_weights.checkpoint_of(ours), "official")
    fresh = Official(18, 16, 8, hidden=head is mlp)
    state = torch.load(target, weights_only=True)["state_dict"]
    fresh.load_state_dict({name[len("module."):]: value for name, value in state.items()}, strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def pixels(size=64):
    return np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)


def output_of(module, images):
    with torch.no_grad():
        return module.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


@pytest.mark.parametrize("family", ["patch", "conv", "resnet"])
def test_official_v3_files_come_in_compute_the_same_and_go_out(tmp_path, family):
    torch.manual_seed(0)
    theirs, ours = OfficialV3(family), method_v3(family)
    source = save(tmp_path / "in.pth.tar", theirs)
    checkpoint = torch_weights.parse(read_state_dict(source), heads=0 if family == "resnet" else 3)
    assert torch_weights.fit(checkpoint).complete
    torch_weights.restore(ours, checkpoint)
    for ours_is, theirs_is in ((ours.encoder, theirs.base_encoder), (ours.key_encoder, theirs.momentum_encoder)):
        embedding, expected = ours_is(pixels()), output_of(theirs_is, pixels())
        np.testing.assert_allclose(embedding, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with torch.no_grad():
        expected = theirs.predictor.eval()(torch.from_numpy(expected)).numpy()
    np.testing.assert_allclose(ours.predictor(embedding), expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    target = str(tmp_path / "out.pth.tar")
    torch_weights.write(target, torch_weights.checkpoint_of(ours), "official")
    fresh = OfficialV3(family)
    content = torch.load(target, weights_only=True)
    assert content["arch"] == ("resnet18" if family == "resnet" else "vit")
    fresh.load_state_dict({name[len("module."):]: value for name, value in content["state_dict"].items()}, strict=True)
    for name, value in theirs.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_a_deit_file_with_its_options_comes_in_and_goes_out(tmp_path):
    torch.manual_seed(0)
    theirs = VisionTransformer(48, 2, 6, patch=8, head=torch.nn.Linear(48, 10))
    source, target = str(tmp_path / "checkpoint.pth"), str(tmp_path / "out.pth")
    torch.save({"model": theirs.state_dict(), "args": argparse.Namespace(lr=1e-3), "epoch": 299, "scaler": {}}, source)
    checkpoint = torch_weights.parse(read_state_dict(source), heads=6)
    assert checkpoint.kind == "probe" and torch_weights.fit(checkpoint).complete
    ours = vit(dim=48, depth=2, heads=6, patch=8, size=64)
    torch_weights.load_backbone(ours, checkpoint, allow_probe=True)
    classify, theirs.head = theirs.head, torch.nn.Identity()
    expected = output_of(theirs, pixels())
    np.testing.assert_allclose(ours(pixels()), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    torch_weights.write(target, checkpoint, "deit")
    theirs.head = classify
    content = torch.load(target, weights_only=True)
    assert list(content) == ["model"]
    fresh = VisionTransformer(48, 2, 6, patch=8, head=torch.nn.Linear(48, 10))
    fresh.load_state_dict(content["model"], strict=True)
    assert torch.equal(fresh.head.weight, classify.weight)


def test_a_linear_probe_of_v3_comes_in(tmp_path):
    probe = VisionTransformer(48, 2, 3, head=torch.nn.Linear(48, 10))
    checkpoint = torch_weights.parse(read_state_dict(save(tmp_path / "in.pth.tar", probe)), heads=3)
    assert checkpoint.kind == "probe"
    torch_weights.write(str(tmp_path / "out.pth.tar"), checkpoint, "official")
    state = torch.load(str(tmp_path / "out.pth.tar"), weights_only=True)["state_dict"]
    probe.load_state_dict({name[len("module."):]: value for name, value in state.items()}, strict=True)


def test_vision_transformers_are_not_compared_with_torchvision():
    model = vit(dim=48, depth=1, heads=3, size=64)
    checkpoint = torch_weights.parse(torch_weights.state_dict(model), heads=3)
    assert torch_weights.difference_from_torchvision(model, checkpoint) is None


@pytest.mark.parametrize("layout, target", [
    ("official", "w.pth.tar"), ("official", "w.safetensors"),
    ("torchvision", "w.pth"), ("torchvision", "w.safetensors")])
def test_files_convert_without_loss(tmp_path, layout, target):
    source = save(tmp_path / "in.pth.tar", Official(18, 16, 8, hidden=False))
    path = str(tmp_path / target)
    exchange(source, path, layout)
    before = torch_weights.parse(read_state_dict(source))
    state = read_state_dict(path)
    expected = torch_weights.LAYOUTS[layout](before)
    assert set(state) == set(expected)
    for name in expected:
        np.testing.assert_array_equal(state[name], expected[name])
        assert (state[name].dtype, state[name].shape) == (expected[name].dtype, expected[name].shape)
    assert sorted(os.listdir(tmp_path)) == sorted(["in.pth.tar", target])


def test_half_precision_files_come_in(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        path = str(tmp_path / "half.pth")
        torch.save({"x": torch.arange(5).to(dtype)}, path)
        np.testing.assert_array_equal(read_state_dict(path)["x"], np.arange(5))


class Attack:
    def __reduce__(self):
        return os.mkdir, (Attack.target,)


@pytest.mark.parametrize("write", ["torch", "legacy", "pickle"])
def test_a_malicious_file_is_refused_and_not_executed(tmp_path, write):
    Attack.target = str(tmp_path / "executed")
    path = tmp_path / "evil.pth"
    content = {"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Attack()}
    if write == "pickle":
        path.write_bytes(pickle.dumps(content))    # not a file that torch.save would write
    else:
        torch.save(content, path, _use_new_zipfile_serialization=write == "torch")
    with pytest.raises(DataError) as caught:
        exchange(str(path), str(tmp_path / "out.pth"), "torchvision")
    assert "\n" not in str(caught.value) and "runs no code" in str(caught.value)
    assert write == "pickle" or "asks for posix.mkdir" in str(caught.value)
    assert os.listdir(tmp_path) == ["evil.pth"]


@pytest.mark.parametrize("name", ["w.pth", "legacy.pth", "w.safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, name, share):
    path = tmp_path / name
    state = {"conv1.weight": torch.randn(64, 3, 7, 7), "bn1.weight": torch.randn(64)}
    if name.endswith("safetensors"):
        safetensors.numpy.save_file({key: value.numpy() for key, value in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=not name.startswith("legacy"))
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * share)])
    with pytest.raises(DataError) as caught:
        exchange(str(path), str(tmp_path / "out.pth"), "torchvision")
    assert "\n" not in str(caught.value) and "whole" in str(caught.value)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("spoil, message", [
    (lambda state: state.pop("module.encoder_q.bn1.bias"), "missing in the file +bn1.bias"),
    (lambda state: state.update({"module.encoder_k.more": torch.zeros(1)}), "unexpected in the file +more"),
    (lambda state: state.pop("module.encoder_q.conv1.weight"), "ResNet-18, 34, 50"),
    (lambda state: state.update({"module.encoder_q.layer3.1.bn1.bias": torch.zeros(3)}),
     r"layer3.1.bn1.bias: model \(256,\), file \(3,\)")])
def test_a_file_of_no_whole_resnet_is_refused(tmp_path, spoil, message, capsys):
    state = {f"module.{name}": value for name, value in Official(18, 16, 8, hidden=False).state_dict().items()}
    spoil(state)
    torch.save({"state_dict": state}, tmp_path / "in.pth")
    with pytest.raises(DataError) as caught:
        exchange(str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "torchvision")
    assert re.search(message, f"{capsys.readouterr().out}{caught.value}")
    assert os.listdir(tmp_path) == ["in.pth"]


@pytest.mark.parametrize("layout, name", [
    ("torchvision", "w.pth"), ("torchvision", "w.safetensors"), ("detectron2", "w.pkl")])
def test_a_full_disk_leaves_no_file(tmp_path, layout, name):
    checkpoint = torch_weights.parse({key: value.numpy() for key, value in network(18).state_dict().items()})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)    # a write beyond the limit then fails as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(DataError) as caught:
            torch_weights.write(str(tmp_path / name), checkpoint, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert "writable" in str(caught.value) and "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content, message", [([1, 2], "with a list"), ({"epoch": 3}, "with none")])
def test_a_file_without_weights_is_refused(tmp_path, content, message):
    path = str(tmp_path / "w.pth")
    torch.save(content, path)
    with pytest.raises(DataError, match=message):
        read_state_dict(path)


def test_the_difference_from_torchvision_is_measured_where_there_is_one(monkeypatch):
    checkpoint = torch_weights.parse({name: value.numpy() for name, value in network(50).state_dict().items()})
    model = resnet(depth=50, size=64)
    torch_weights.load_backbone(model, checkpoint, allow_probe=True)
    resnets = types.SimpleNamespace(ResNet=ResNet, BasicBlock="basic", Bottleneck="bottleneck")
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", resnets)
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    assert 0 < torch_weights.difference_from_torchvision(model, checkpoint) < 1e-5
    model.get_layer("layer2.1.bn2").beta.assign_add([1.0] * 128)
    assert torch_weights.difference_from_torchvision(model, checkpoint) > 1e-3
    wide = torch_weights.parse(torch_weights.state_dict(resnet(depth=18, width=0.25, size=32)))
    assert torch_weights.difference_from_torchvision(model, wide) is None
    monkeypatch.setitem(sys.modules, "torchvision.models.resnet", None)
    assert torch_weights.difference_from_torchvision(model, checkpoint) is None


def test_an_insdis_file_with_its_options_is_read_and_starts_both_encoders(tmp_path):
    encoders = [encoder(resnet(depth=18, width=0.25, size=32), lambda x: linear(x, dim=16)) for _ in range(2)]
    state = {f"encoder.module.{name}": torch.from_numpy(np.array(value))
             for name, value in torch_weights.state_dict(encoders[0]).items()}
    path = str(tmp_path / "ckpt_epoch_10.pth")
    torch.save({"opt": argparse.Namespace(nce_k=4096), "model": state, "epoch": 10}, path)
    checkpoint = torch_weights.parse(read_state_dict(path))
    assert checkpoint.kind == "pretraining" and checkpoint.queue is None and not checkpoint.key_encoder
    method = MoCo(encoders[1], dim=16, queue_size=32, temperature=0.1, momentum=0.9)
    torch_weights.restore(method, checkpoint)
    for ours in (method.encoder, method.key_encoder):
        for value, expected in zip(ours.get_weights(), encoders[0].get_weights()):
            np.testing.assert_array_equal(value, expected)
