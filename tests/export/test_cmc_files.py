"""Files as CMC's code writes them, and its networks in PyTorch, against ours. Needs the extra `torch`."""

import argparse
import os

import numpy as np
import pytest
import torch

from moco_tf import config as configs
from moco_tf.errors import DataError
from moco_tf.evaluation.encoders import open_encoder
from moco_tf.export.exchange import exchange
from moco_tf.export.torch_files import read_state_dict
from moco_tf.train import restore_method
from twins import HalfAlexNet, ResNet, spread

pytestmark = pytest.mark.torch

R50 = ("bottleneck", (3, 4, 6, 3))
R18 = ("basic", (2, 2, 2, 2))
ROWS = 20    # of a bank


class Encoder(torch.nn.Module):
    """A model of CMC's code: its encoder is wrapped for several GPUs."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = torch.nn.DataParallel(encoder)


class Halves(torch.nn.Module):
    """Both encoders of CMC; as a whole, luminance and chroma (B, 3, S, S) to both embeddings, joined."""

    def __init__(self, build):
        super().__init__()
        self.l_to_ab, self.ab_to_l = build(1), build(2)

    def forward(self, x):
        return torch.cat([self.l_to_ab(x[:, :1]), self.ab_to_l(x[:, 1:])], dim=1)


def build(name):
    torch.manual_seed(0)
    model = Encoder({
        "alexnet": lambda: Halves(HalfAlexNet),
        "resnet50v1": lambda: Halves(lambda inputs: ResNet(*R50, num_classes=128, width=0.5, inputs=inputs)),
        "resnet18": lambda: ResNet(*R18, num_classes=128, width=0.25)}[name]())
    spread(model)
    return model


def contrast_of(*names, partitions, params=(16, 0.07)):
    rows = {name: torch.rand(ROWS, 128) - 0.5 for name in names}
    return {"params": torch.tensor([*params, *partitions, 0.5]), **rows}


def write(path, model, contrast, **others):
    """As train_CMC.py and train_moco_ins.py save."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    torch.save({"opt": argparse.Namespace(nce_k=16, **others.pop("opt", {})), "model": model.state_dict(),
                "contrast": contrast, "optimizer": optimizer.state_dict(), "epoch": 3, **others}, path)
    return str(path)


def assert_same(path, model, contrast):
    """That a file loads strictly into a new model of the code, and its memory is the same, bit for bit."""
    content = torch.load(path, weights_only=True)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    model.load_state_dict(content["model"], strict=True)
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, expected[name]), name
    assert set(content["contrast"]) == set(contrast)
    for name, value in contrast.items():
        assert content["contrast"][name].dtype == value.dtype and torch.equal(content["contrast"][name], value), name
    return content


def assert_same_outputs(encoder, model, channels=3):
    images = np.random.default_rng(0).normal(size=(2, 224, 224, channels)).astype(np.float32)
    with torch.no_grad():
        expected = model.eval().encoder.module(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    ours = encoder(images, training=False).numpy()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_cmc_alexnet_becomes_a_run_computes_the_same_and_goes_out(tmp_path, capsys):
    model = build("alexnet")
    assert sum(parameter.numel() for parameter in model.parameters()) == 29_687_760
    contrast = contrast_of("memory_l", "memory_ab", partitions=(44.5, 46.25))
    source = write(tmp_path / "ckpt_epoch_240.pth", model, contrast, opt=dict(view="YCbCr", softmax=False))
    exchange(source, str(tmp_path / "run"))
    told = capsys.readouterr().out
    for part in ("a pre-training checkpoint of CMC", "l_to_ab (1 channel) and ab_to_l (2 channels) of YCbCr", "alexnet",
                 "2 memory banks of 20 rows", "K 16", "T 0.07", "Z 44.5 and 46.25", "ab_to_l.fc6.0.weight"):
        assert part in told
    method, config, _ = restore_method(str(tmp_path / "run"))
    recipe = configs.load("cmc_alexnet")
    assert config.branches == (("l_to_ab", 1), ("ab_to_l", 2))
    assert config.views.to_dict() == {**recipe.views, "space": "YCbCr"}
    assert config.method.to_dict() == {**recipe.method, "name": "cmc", "loss": "nce", "bank_size": ROWS,
                                       "num_negatives": 16, "temperature": 0.07, "momentum": 0.5}
    assert_same_outputs(method.encoder, model)
    np.testing.assert_array_equal(method.banks[1].rows, contrast["memory_ab"])
    exchange(str(tmp_path / "run"), str(tmp_path / "out.pth"), "cmc")
    assert assert_same(tmp_path / "out.pth", model, contrast)["opt"] == {"view": "YCbCr"}


def test_a_cmc_resnet50v1_is_evaluated_as_it_is_and_goes_out(tmp_path):
    model, contrast = build("resnet50v1"), contrast_of("memory_l", "memory_ab", partitions=(-1, -1))
    assert sum(parameter.numel() for parameter in model.parameters()) == 12_058_048
    source = write(tmp_path / "ckpt_epoch_240.pth", model, contrast)
    encoder = open_encoder(source)
    assert encoder.config.views.space == "Lab" and encoder.config.method.loss == "softmax" and encoder.width == 2048
    assert_same_outputs(encoder.models["embedding"], model)
    exchange(source, str(tmp_path / "out.pth"), "cmc")
    assert_same(tmp_path / "out.pth", model, contrast)


def test_an_insdis_file_becomes_a_run_with_its_bank_and_goes_out(tmp_path):
    model, contrast = build("resnet18"), contrast_of("memory", partitions=(43.75,), params=(16, 0.1))
    source = write(tmp_path / "current.pth", model, contrast)
    exchange(source, str(tmp_path / "run"))
    method, config, _ = restore_method(str(tmp_path / "run"))
    assert (config.method.name, config.method.loss, config.method.temperature) == ("insdis", "nce", 0.1)
    np.testing.assert_array_equal(method.banks[0].rows, contrast["memory"])
    assert float(method.criteria[0].partition) == 43.75
    assert_same_outputs(method.encoder, model)
    exchange(str(tmp_path / "run"), str(tmp_path / "out.pth"), "cmc")
    assert_same(tmp_path / "out.pth", model, contrast)


def test_moco_of_the_same_code_comes_in_with_both_encoders_and_goes_out(tmp_path):
    model, momentum = build("resnet18"), build("resnet18")
    with torch.no_grad():
        for value in momentum.parameters():
            value.mul_(1.5)
    contrast = {"params": torch.tensor([-1]), "memory": torch.rand(10, 128)}
    source = write(tmp_path / "current.pth", model, contrast, model_ema=momentum.state_dict())
    assert_same_outputs(open_encoder(source, side="key").models["embedding"], momentum)
    exchange(source, str(tmp_path / "out.pth"), "cmc")
    content = assert_same(tmp_path / "out.pth", model, contrast)
    momentum.load_state_dict(content["model_ema"], strict=True)
    assert read_state_dict(source)["contrast.memory"].shape == (10, 128)


def test_a_file_without_its_bank_starts_no_run(tmp_path):
    source = str(tmp_path / "model.pth")
    torch.save({"model": build("resnet18").state_dict()}, source)
    with pytest.raises(DataError, match="InsDis goes on with its memory bank.*no memory bank"):
        exchange(source, str(tmp_path / "run"))
    assert os.listdir(tmp_path) == ["model.pth"]
