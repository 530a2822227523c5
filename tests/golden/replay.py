"""What every replay of a golden file needs: its runs and settings, models built from them, errors as the files count.

Every *.npz of the folder in MOCO_TF_GOLDEN (default: this one) is looked at; each run has its settings and tolerances.
"""

import contextlib
import glob
import json
import os
import re

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.alexnet import NUMBERED_LAYERS
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.backbones.resnet import BLOCKS, numbered_layers
from moco_tf.export.torch_weights import load_into, state_dict
from moco_tf.heads import HEADS, encoder, predictor

from . import weights

keras = tf.keras

FOLDER = os.environ.get("MOCO_TF_GOLDEN") or os.path.dirname(__file__)
DTYPES = {"f32": "float32", "f64": "float64"}


class Run:
    """One run of a golden file: its settings, and its arrays by their key below the run's name."""

    def __init__(self, path, name):
        self.file, self.name = np.load(path, allow_pickle=False), name
        self.settings = json.loads(str(self.file[f"{name}/settings"]))
        self.tags = json.loads(str(self.file["settings"])).get("tags", [])
        self.id = f"{os.path.basename(path)[:-len('.npz')]}:{name}"

    def __getitem__(self, key):
        return self.file[f"{self.name}/{key}"]

    def keys(self, prefix=""):
        start = f"{self.name}/{prefix}"
        return [key[len(self.name) + 1:] for key in self.file.files if key.startswith(start)]

    def tolerance(self, tag, quantity="all", step=None):
        """The allowed error; None: not to be compared."""
        value = self.settings["tolerance"][tag]
        value = value.get(quantity) if isinstance(value, dict) else value
        return value[step] if isinstance(value, list) else value


def runs(kind, supported=lambda settings: True):
    """The runs of a kind in all files, but for those of models that do not exist here (`supported` says no)."""
    found = []
    for path in sorted(glob.glob(os.path.join(FOLDER, "*.npz"))):
        with np.load(path, allow_pickle=False) as file:
            listed = json.loads(str(file["settings"]))["runs"] if "settings" in file.files else {}
        found += [Run(path, name) for name, its in listed.items() if its == kind]
    return [run for run in found if supported(run.settings)]


def cases(kind, supported=lambda settings: True, slow=lambda settings: False):
    """Arguments of `pytest.mark.parametrize`: every run of a kind in each of its precisions."""
    pairs = [pytest.param(run, tag, marks=[pytest.mark.slow] * slow(run.settings), id=f"{run.id}-{tag}")
             for run in runs(kind, supported) for tag in run.tags]
    return dict(argnames="run, tag", argvalues=pairs)


def has_encoder(settings):
    """Whether the project has the encoder, or both of a pair: a ResNet, half an AlexNet or a vision transformer,
    without a head or with one of its method's."""
    return (settings["method"] in (None, "moco", "moco_v1", "moco_v2", "moco_v3", "insdis", "cmc")
            and settings["backbone"]["family"] in BACKBONES)


@contextlib.contextmanager
def precision(tag):
    """Models built inside are whole in this precision."""
    keras.backend.set_floatx(DTYPES[tag])
    keras.mixed_precision.set_global_policy(DTYPES[tag])
    try:
        yield
    finally:
        keras.backend.set_floatx("float32")
        keras.mixed_precision.set_global_policy("float32")


def strategy_of(replicas):
    """One replica, or several on the CPU; without collective kernels, whose keys clash between strategies."""
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)],
                                          cross_device_ops=tf.distribute.ReductionToOneDevice())


def build_encoder(settings, bn_group_size=None, positions=None):
    """The encoder of a run, or its backbone where it has no head, with the weights of the rule.

    `positions`: the reference's position embedding for a vision transformer, (1 + patches, D); None: our own.
    """
    def backbone(channels):
        return _backbone(settings, bn_group_size, channels)

    def attach(features):
        return _head(features, settings["head"], bn_group_size)

    branches, head = branches_of(settings), settings["head"]
    if branches:
        model = branched_backbone(branches, backbone, settings["image_size"])
        model = encoder(model, lambda features: branched_head(branches, attach, features))
    else:
        model = backbone(len(settings["branches"][0]["channels"]))
        model = encoder(model, attach) if head else model
    if positions is not None:
        model.get_layer("tokens").pos_embed.assign(positions[None])
    # MoCo v3 calls a ResNet's projector `fc`, a transformer's `head`, and CMC an AlexNet's `fc8.0`; here all are `fc`.
    head_name = re.sub(r"^(fc|head)\..*", r"\1", head["modules"][0]["name"]) if head else "fc"
    return _with_weights(model, settings, lambda name: re.sub(r"^(\w+\.)?fc\b", rf"\g<1>{head_name}", name))


def branches_of(settings):
    """((name, channels), ...) of a run with an encoder for each view, as in a config; () for one of all channels."""
    branches = settings["branches"]
    assert sum((branch["channels"] for branch in branches), []) == list(range(3))    # in the order of the image
    if len(branches) == 1:
        return ()
    return tuple((branch["prefix"][:-len(".")], len(branch["channels"])) for branch in branches)


def config_of(settings):
    """What a config says of the encoder."""
    backbone = settings["backbone"]
    depth = dict(depth=_depth(backbone)) if backbone["family"] == "resnet" else {}
    return ConfigDict(dict(backbone=dict(name=backbone["family"], **depth), branches=branches_of(settings)))


def build_predictor(settings, bn_group_size=None):
    """The predictor of a MoCo v3 run with the weights of the rule."""
    layers = settings["predictor"]
    model = predictor(**_projector_arguments(layers), last_bn=layers["output_bn"], bn_group_size=bn_group_size)
    return _with_weights(model, settings)


def layer_names(settings):
    """The names here of the layers that a run's outputs call `layer1` and so on, but for the head's, the last."""
    family = settings["backbone"]["family"]
    if family == "vit":
        return {}
    names = NUMBERED_LAYERS if family == "alexnet" else numbered_layers(_depth(settings["backbone"]))
    return {f"layer{number}": name for number, name in names.items()}


def _backbone(settings, bn_group_size, channels):
    backbone = settings["backbone"]
    common = dict(bn_group_size=bn_group_size, size=settings["image_size"], channels=channels)
    if backbone["family"] == "alexnet":
        return BACKBONES["alexnet"](**common)
    if backbone["family"] == "vit":
        return BACKBONES["vit"](
            dim=backbone["embed_dim"], depth=backbone["depth"], heads=backbone["num_heads"],
            patch=backbone["patch_size"], mlp_ratio=backbone["mlp_ratio"], stem=backbone["stem"],
            freeze_patch=backbone["stop_grad_conv1"], **common)
    return BACKBONES["resnet"](
        depth=_depth(backbone), width=backbone["width_multiplier"], groups=backbone["groups"],
        width_per_group=backbone["width_per_group"], stem_channels=backbone.get("stem_channels"), **common)


def _depth(backbone):
    return next(depth for depth, blocks in BLOCKS.items()
                if list(blocks) == backbone["layers"] and (depth >= 50) == (backbone["block"] == "bottleneck"))


def _head(features, head, bn_group_size):
    if head["hidden_bn"]:
        return HEADS["projector"](features, **_projector_arguments(head), bn_group_size=bn_group_size)
    hidden = dict(hidden_dim=tuple(head["dims"][1:-1])) if head["kind"] == "mlp" else {}
    return HEADS[head["kind"]](features, dim=head["dims"][-1], **hidden)


def _projector_arguments(layers):
    return dict(layers=len(layers["dims"]) - 1, hidden_dim=layers["dims"][1], dim=layers["dims"][-1])


def _with_weights(model, settings, rule_name=lambda name: name):
    """The model with the rule's weights, but for the position embedding, which the rule does not draw."""
    state = {name: weights.param(rule_name(name), value.shape, settings["seed"])
             for name, value in state_dict(model).items() if name != "pos_embed"}
    report = load_into(model, state, strict=False)
    assert set(report.missing) <= {"pos_embed"} and not report.unexpected and not report.misshapen
    return model


largest = {}    # (run, tag) -> (largest error over its tolerance seen, the error, of what): conftest.py prints it


def check(run, tag, value, expected, what, tolerance=None, scale=None):
    """Asserts max|a - b| / max|b| (or / `scale`), the files' measure, against the tolerance, by default the run's."""
    tolerance = run.tolerance(tag) if tolerance is None else tolerance
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape, what
    error = np.abs(value - expected).max() / (scale or np.abs(expected).max() or 1.0)
    largest[run.id, tag] = max(largest.get((run.id, tag), (0,)), (error / tolerance, error, what))
    assert error <= tolerance, f"{what}: {error:.2e} > {tolerance:.0e}"
