"""What every replay of a golden file needs: its runs and settings, models built from them, errors as the files count.

Every *.npz of the folder in MOCO_TF_GOLDEN (default: this one) is looked at; each run has its settings and tolerances.
"""

import contextlib
import glob
import json
import os
import re

import numpy as np
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.resnet import BLOCKS
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


def cases(kind, supported=lambda settings: True):
    """Arguments of `pytest.mark.parametrize`: every run of a kind in each of its precisions."""
    pairs = [(run, tag) for run in runs(kind, supported) for tag in run.tags]
    return dict(argnames="run, tag", argvalues=pairs, ids=[f"{run.id}-{tag}" for run, tag in pairs])


def has_encoder(settings):
    """Whether the project has the encoder: RGB, a ResNet of even width or a vision transformer, without a head or with
    one of the heads of MoCo.

    CMC's encoders and InsDis's wide one (whose stem keeps its width) are not here yet.
    """
    backbone = settings["backbone"]
    return (settings["method"] in (None, "moco", "moco_v1", "moco_v2", "moco_v3", "insdis")
            and backbone["family"] in BACKBONES and len(settings["branches"]) == 1
            and backbone.get("stem_channels") in (None, 64 * backbone.get("width_multiplier", 1)))


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
    model = _backbone(settings, bn_group_size)
    head = settings["head"]
    if head:
        model = encoder(model, lambda features: _head(features, head, bn_group_size))
    if positions is not None:
        model.get_layer("tokens").pos_embed.assign(positions[None])
    # MoCo v3 calls a ResNet's projector `fc`, a transformer's `head`; here it is `fc` in both.
    head_name = head["modules"][0]["name"].split(".")[0] if head else "fc"
    return _with_weights(model, settings, lambda name: re.sub(r"^fc\b", head_name, name))


def build_predictor(settings, bn_group_size=None):
    """The predictor of a MoCo v3 run with the weights of the rule."""
    layers = settings["predictor"]
    model = predictor(**_projector_arguments(layers), last_bn=layers["output_bn"], bn_group_size=bn_group_size)
    return _with_weights(model, settings)


def _backbone(settings, bn_group_size):
    backbone = settings["backbone"]
    common = dict(bn_group_size=bn_group_size, size=settings["image_size"],
                  channels=len(settings["branches"][0]["channels"]))
    if backbone["family"] == "vit":
        return BACKBONES["vit"](
            dim=backbone["embed_dim"], depth=backbone["depth"], heads=backbone["num_heads"],
            patch=backbone["patch_size"], mlp_ratio=backbone["mlp_ratio"], stem=backbone["stem"],
            freeze_patch=backbone["stop_grad_conv1"], **common)
    depth = next(depth for depth, blocks in BLOCKS.items()
                 if list(blocks) == backbone["layers"] and (depth >= 50) == (backbone["block"] == "bottleneck"))
    return BACKBONES["resnet"](depth=depth, width=backbone["width_multiplier"], groups=backbone["groups"],
                               width_per_group=backbone["width_per_group"], **common)


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
