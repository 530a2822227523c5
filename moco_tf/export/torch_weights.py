"""PyTorch weights in and out: one name table, read both ways.

Layers carry the names of PyTorch's modules, so a variable's name there is its layer's name and one of `SUFFIXES`.
Files, models and layouts meet in one value, `Checkpoint`:

    .pth, .pth.tar, .safetensors -- read_state_dict, parse --> Checkpoint -- restore, load_backbone --> model
    model -- checkpoint_of --> Checkpoint -- LAYOUTS[layout], write --> .pth, .pth.tar, .safetensors, .pkl
"""

import argparse
import importlib
import os
import pickle
import re
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from moco_tf.backbones.resnet import BLOCKS, resnet
from moco_tf.errors import DataError, UsageError
from moco_tf.heads import HEADS, encoder as join

keras = tf.keras

SUFFIXES = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
            "moving_mean": "running_mean", "moving_variance": "running_var"}
AXES_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}    # kernels: (H, W, in, out) -> (out, in, H, W); (in, out) -> (out, in)
AXES_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
COUNTER = "num_batches_tracked"                 # PyTorch's BatchNorm counts batches, and uses the count for nothing
HEAD = "fc."


class Checkpoint(NamedTuple):
    """What a file or a method holds, in PyTorch's names and layout.

    kind: "pretraining", "probe" (backbone and classifier) or "backbone"; encoder, key_encoder: name -> array, without
    prefix, the latter empty if there is none; queue: (K, C) or None; pointer: the row that is written next.
    """

    kind: str
    encoder: dict
    key_encoder: dict
    queue: Optional[np.ndarray] = None
    pointer: int = 0


class Report(NamedTuple):
    """How the names of a state dict met those of a model; `misshapen` holds (name, shape in the model, in the file)."""

    matched: list
    missing: list
    unexpected: list
    misshapen: list

    @property
    def complete(self):
        return not (self.missing or self.unexpected or self.misshapen)

    def table(self):
        """One line a name: what became of it."""
        lines = [("matched", name) for name in self.matched]
        lines += [("missing in the file", name) for name in self.missing]
        lines += [("unexpected in the file", name) for name in self.unexpected]
        lines += [("wrong shape", f"{name}: model {ours}, file {theirs}") for name, ours, theirs in self.misshapen]
        return "\n".join(f"{state:<24}{name}" for state, name in lines)


# ---- models and state dicts -------------------------------------------------------------------------------------


def named_variables(model):
    """PyTorch name -> variable, for every weight of a flat model."""
    return {f"{layer.name}.{SUFFIXES[variable.name.split('/')[-1].split(':')[0]]}": variable
            for layer in model.layers for variable in layer.weights}


def named_shapes(model):
    """PyTorch name -> shape in PyTorch's layout, for every weight of a flat model."""
    shapes = {name: tuple(variable.shape) for name, variable in named_variables(model).items()}
    return {name: tuple(shape[axis] for axis in AXES_TO_TORCH.get(len(shape), range(len(shape))))
            for name, shape in shapes.items()}


def state_dict(model, batches=0):
    """The weights of a model in PyTorch's names and layout; `batches` goes into the counters of BatchNorm."""
    state = {}
    for name, variable in named_variables(model).items():
        state[name] = _transposed(variable.numpy(), AXES_TO_TORCH)
        if name.endswith("running_var"):
            state[name.replace("running_var", COUNTER)] = np.array(batches, np.int64)
    return state


def match(model, state):
    """How a state dict, in PyTorch's names and layout and without prefix, would fit a flat model: a Report."""
    ours = named_shapes(model)
    theirs = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}
    both = [name for name in ours if name in theirs]
    return Report(
        matched=[name for name in both if ours[name] == theirs[name]],
        missing=[name for name in ours if name not in theirs],
        unexpected=[name for name in theirs if name not in ours],
        misshapen=[(name, ours[name], theirs[name]) for name in both if ours[name] != theirs[name]])


def load_into(model, state, strict=True):
    """Assigns a state dict, in PyTorch's names and layout and without prefix, to a flat model.

    Returns:
        The Report; where it is not complete, what matched is assigned.

    Raises:
        DataError: it is not complete, and `strict`; nothing is assigned then.
    """
    report = match(model, state)
    if strict:
        _require(report)
    variables = named_variables(model)
    for name in report.matched:
        value = np.asarray(_transposed(state[name], AXES_FROM_TORCH))
        variables[name].assign(value.astype(variables[name].dtype.as_numpy_dtype))
    return report


def _require(report):
    if not report.complete:
        raise DataError(f"The weights must be those of this very model. Received: {_first_differences(report)}. "
                        "Build the model that the file was made with.")


def _first_differences(report):
    wrong = [f"{name} {theirs}, not {ours}" for name, ours, theirs in report.misshapen]
    kinds = (("missing", report.missing), ("unexpected", report.unexpected), ("of another shape", wrong))
    return "; ".join(f"{len(names)} {kind}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
                     for kind, names in kinds if names)


def _transposed(value, axes):
    return np.transpose(value, axes[value.ndim]) if value.ndim in axes else value


# ---- checkpoints and what they hold ----------------------------------------------------------------------------


def parse(state):
    """A state dict as read from a file -> Checkpoint.

    Raises:
        DataError: it is of a model that does not exist here, or of none that is known.
    """
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    for prefixes, what in FOREIGN.items():
        if any(name.startswith(prefixes) for name in state):
            raise DataError(f"The file must be of MoCo v1 or v2, or a ResNet. Received: {what}.")
    if any(name.startswith("encoder_q.") for name in state):
        queue = state.get("queue")
        return Checkpoint(
            "pretraining", _below("encoder_q.", state), _below("encoder_k.", state),
            None if queue is None else np.ascontiguousarray(queue.T), int(np.ravel(state.get("queue_ptr", 0))[0]))
    if "encoder.module.conv1.weight" in state:    # InsDis of the CMC repository: its memory bank is not in the state
        return Checkpoint("pretraining", _below("encoder.module.", state), {})
    if "conv1.weight" not in state:
        raise DataError("The file must be of MoCo v1 or v2, or a ResNet in torchvision's names. Received: "
                        f"{len(state)} names such as {', '.join(list(state)[:3]) or '(none)'}.")
    return Checkpoint("probe" if any(name.startswith(HEAD) for name in state) else "backbone", state, {})


FOREIGN = {    # told by how their names begin
    ("base_encoder.", "momentum_encoder."): "a MoCo v3 pre-training file",
    ("l_to_ab.", "ab_to_l.", "encoder.module.l_to_ab.", "encoder.l_to_ab."): "a CMC pre-training file",
    ("cls_token", "patch_embed."): "a vision transformer",
}


def _below(prefix, state):
    return {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}


def architecture(encoder):
    """The arguments with which `resnet` and the head build the encoder of a state dict.

    Returns:
        {"backbone": arguments of `resnet`, "head": None or {"name": "linear" or "mlp", ...}}.

    Raises:
        DataError: the shapes are not of a ResNet that `resnet` builds.
    """
    blocks = tuple(len({name.split(".")[1] for name in encoder if name.startswith(f"layer{stage}.")})
                   for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in encoder
    try:
        depth = next(d for d, counts in BLOCKS.items() if counts == blocks and (d >= 50) == bottleneck)
        planes, channels, side, _ = encoder["conv1.weight"].shape
        inner = encoder["layer1.0.conv1.weight"].shape[0]
        groups = inner // encoder["layer1.0.conv2.weight"].shape[1] if bottleneck else 1
        width_per_group = inner * 64 // (groups * planes) if bottleneck else 64
    except (KeyError, IndexError, StopIteration, ValueError, ZeroDivisionError):
        raise DataError("The file must hold a ResNet-18, 34, 50, 101 or 152 in torchvision's names. "
                        f"Received: names such as {', '.join(list(encoder)[:3])}.") from None
    backbone = dict(depth=depth, width=planes // 64 if planes % 64 == 0 else planes / 64, groups=groups,
                    width_per_group=width_per_group, stem="imagenet" if side == 7 else "cifar", channels=channels)
    widths = [encoder[name].shape[0] for name in sorted(encoder, key=_layer_number)
              if name.startswith(HEAD) and name.endswith("weight")]
    if not widths:
        return {"backbone": backbone, "head": None}
    head = dict(name="linear" if "fc.weight" in encoder else "mlp", dim=widths[-1])
    if head["name"] == "mlp":
        head["hidden_dim"] = widths[0] if len(widths) == 2 else tuple(widths[:-1])
    return {"backbone": backbone, "head": head}


def _layer_number(name):
    return int((re.findall(r"\d+", name) or [0])[0])


def fit(checkpoint):
    """The Report of the checkpoint's encoders against the very model that `architecture` says they are of."""
    built = architecture(checkpoint.encoder)
    with tf.Graph().as_default():    # shapes alone: no memory, no initial values
        model = resnet(**built["backbone"])
        if built["head"]:
            arguments = dict(built["head"])
            head = HEADS[arguments.pop("name")]
            model = join(model, lambda features: head(features, **arguments))
        reports = [match(model, state) for state in (checkpoint.encoder, checkpoint.key_encoder) if state]
    return next((report for report in reports if not report.complete), reports[0])


def describe(checkpoint):
    """What the checkpoint is, and the encoder it takes, in one sentence."""
    built = architecture(checkpoint.encoder)
    what = {"pretraining": "a MoCo v1 or v2 pre-training checkpoint", "backbone": "a backbone without a head",
            "probe": "a backbone with a trained classifier, as a linear probe leaves it"}[checkpoint.kind]
    parts = [f"resnet({_arguments(built['backbone'])})"]
    if built["head"]:
        parts.append(f"head {_arguments(built['head'])}")
    if checkpoint.kind == "pretraining":
        parts.append("momentum encoder" if checkpoint.key_encoder else "no momentum encoder")
        parts.append("no queue" if checkpoint.queue is None else f"queue of {len(checkpoint.queue)} keys")
    return f"{what}: {', '.join(parts)}"


def _arguments(values):
    return ", ".join(f"{name}={value}" for name, value in values.items())


def checkpoint_of(method):
    """The Checkpoint of a MoCo method: both encoders, queue and pointer."""
    batches = int(method.optimizer.iterations.numpy()) if method.optimizer else 0
    return Checkpoint("pretraining", state_dict(method.encoder, batches), state_dict(method.key_encoder, batches),
                      method.queue.keys.numpy(), int(method.queue.pointer.numpy()))


def restore(method, checkpoint, backbone_only=False):
    """Loads a pre-training checkpoint into a MoCo method.

    Where the file has no momentum encoder, the method's becomes a copy of the encoder; where no queue, the queue stays.

    Args:
        method: with `encoder`, `key_encoder` and `queue`.
        checkpoint: a Checkpoint.
        backbone_only: start from a backbone, or a probe's: heads and queue stay as they are.

    Returns:
        The Report of the encoder.

    Raises:
        DataError: another architecture or queue; not a pre-training checkpoint, unless `backbone_only`.
    """
    if backbone_only:
        report = _load_backbone(method.encoder, checkpoint)
        _load_backbone(method.key_encoder, checkpoint)
        return report
    if checkpoint.kind != "pretraining":
        raise DataError("Pre-training goes on from a pre-training checkpoint. "
                        f"Received: {describe(checkpoint)}. To start from its backbone, ask for the backbone only.")
    if checkpoint.queue is not None and checkpoint.queue.shape != tuple(method.queue.keys.shape):
        raise DataError("The queue must have as many keys, of as many values, as the method's, "
                        f"{tuple(method.queue.keys.shape)}. Received: {checkpoint.queue.shape}. "
                        "Set method.queue_size and head.dim to the file's.")
    states = ((method.encoder, checkpoint.encoder), (method.key_encoder, checkpoint.key_encoder or checkpoint.encoder))
    for model, state in states:    # all is well before anything changes
        _require(match(model, state))
    report, _ = [load_into(model, state) for model, state in states]
    if checkpoint.queue is not None:
        method.queue.keys.assign(checkpoint.queue)
        method.queue.pointer.assign(checkpoint.pointer)
    return report


def load_backbone(backbone, checkpoint, allow_probe=False):
    """Loads the backbone of a checkpoint into a backbone, or an encoder whose head stays as it is.

    Raises:
        DataError: another architecture; the file is a probe's or a classifier's, unless `allow_probe`.
    """
    if checkpoint.kind == "probe" and not allow_probe:
        raise DataError("The file must be a pre-trained one. Received: "
                        f"{describe(checkpoint)}. If its backbone is wanted all the same, allow a probe.")
    return _load_backbone(backbone, checkpoint)


def _load_backbone(model, checkpoint):
    trunk = keras.Model(model.input, model.get_layer("features").output)
    return load_into(trunk, _headless(checkpoint.encoder))


def _headless(encoder):
    return {name: value for name, value in encoder.items() if not name.startswith(HEAD)}


# ---- layouts ----------------------------------------------------------------------------------------------------


def official(checkpoint):
    """The state dict of facebookresearch/moco: both encoders, the queue as (C, K), the pointer."""
    state = {f"module.encoder_q.{name}": value for name, value in checkpoint.encoder.items()}
    state.update({f"module.encoder_k.{name}": value for name, value in checkpoint.key_encoder.items()})
    if checkpoint.queue is not None:
        state["module.queue"] = np.ascontiguousarray(checkpoint.queue.T)
        state["module.queue_ptr"] = np.array([checkpoint.pointer], np.int64)
    return state


def torchvision(checkpoint):
    """The state dict of torchvision's ResNet: the backbone, and the classifier where the checkpoint is a probe's."""
    return dict(checkpoint.encoder) if checkpoint.kind == "probe" else _headless(checkpoint.encoder)


def detectron2(checkpoint):
    """Arrays by the names of Detectron2's ResNet, as the reference's converter writes them, head and counters too."""
    return {_detectron2_name(name): value for name, value in checkpoint.encoder.items()}


def _detectron2_name(name):
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


LAYOUTS = {"official": official, "torchvision": torchvision, "detectron2": detectron2}


# ---- files ------------------------------------------------------------------------------------------------------

TORCH_FILES = (".pth", ".pth.tar", ".pt")
DETECTRON2_FILE = ".pkl"
SAFETENSORS_FILE = ".safetensors"


def read_state_dict(path):
    """The state dict of a .pth, .pth.tar, .pt or .safetensors file, name -> array. Nothing in the file is executed.

    Raises:
        UsageError: another kind of file, or the package that reads it is missing.
        DataError: no such file, or it is broken, or would need more than reading.
    """
    if not path.endswith(TORCH_FILES + (SAFETENSORS_FILE,)):
        raise UsageError("Weights are read from .pth, .pth.tar, .pt or .safetensors. "
                         f"Received: {path}. Rename the file, or convert it first.")
    if not os.path.isfile(path):
        raise DataError(f"The file of weights must exist. Received: {path}.")
    state = _read_safetensors(path) if path.endswith(SAFETENSORS_FILE) else _read_torch(path)
    if not state:
        raise DataError(f"The file must hold arrays by name. Received: {path}, with none.")
    return state


def _read_safetensors(path):
    package = _need("safetensors.numpy")
    try:
        return dict(package.load_file(path))
    except Exception as error:    # a broken file can make the reader fail in any way
        raise DataError(f"The file must be a whole .safetensors file. Received: {path}: {_line(error)}.") from None


def _read_torch(path):
    torch = _need("torch")
    try:
        # CMC's and InsDis' files hold their options in a Namespace: a plain record, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:    # a broken file can make the reader fail in any way
        needs = re.search(r"GLOBAL ([\w.]+\w)|Unsupported (operand \d+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and needs:
            raise DataError(
                "A PyTorch file may hold tensors and plain values only, so that reading it runs no code. Received: "
                f"{path}, which asks for {needs[1] or needs[2]}. Save its state dict alone.") from None
        raise DataError(f"The file must be a whole PyTorch file. Received: {path}: {_line(error)}.") from None
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise DataError(f"The file must hold a state dict. Received: {path}, with a {type(content).__name__}.")
    return {name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
            for name, value in content.items() if isinstance(value, torch.Tensor)}


def write(path, checkpoint, layout):
    """Writes a checkpoint in one of LAYOUTS; the suffix says the kind of file. No broken file is ever left.

    .pth, .pth.tar and .pt: PyTorch, for "official" with the state dict under "state_dict", as its own files have it;
    .safetensors: arrays; .pkl: "detectron2" only.

    Raises:
        UsageError: unknown layout, or a suffix or checkpoint that does not go with it; a package is missing.
        DataError: the file cannot be written.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"The layout must be one of {', '.join(LAYOUTS)}. Received: {layout!r}.")
    if layout == "official" and checkpoint.kind != "pretraining":
        raise UsageError("The official layout is that of pre-training. "
                         f"Received: {describe(checkpoint)}. Use layout torchvision or detectron2.")
    suffixes = (DETECTRON2_FILE,) if layout == "detectron2" else TORCH_FILES + (SAFETENSORS_FILE,)
    if not path.endswith(suffixes):
        raise UsageError(f"A file in layout {layout} must end in {' or '.join(suffixes)}. Received: {path}.")
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            _write_content(file, path, checkpoint, layout)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:    # PyTorch turns a full disk into a RuntimeError
        raise DataError(f"The target must be writable. Received: {path}: {_line(error)}.") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _write_content(file, path, checkpoint, layout):
    state = {name: np.array(value, order="C") for name, value in LAYOUTS[layout](checkpoint).items()}
    if layout == "detectron2":
        pickle.dump({"model": state, "__author__": "MOCO", "matching_heuristics": True}, file)
    elif path.endswith(SAFETENSORS_FILE):
        file.write(_need("safetensors.numpy").save(state, metadata={"format": "pt"}))
    else:
        torch = _need("torch")
        tensors = {name: torch.from_numpy(value) for name, value in state.items()}
        arch = f"resnet{architecture(checkpoint.encoder)['backbone']['depth']}"
        torch.save({"arch": arch, "state_dict": tensors} if layout == "official" else tensors, file)


def convert(source, target, layout):
    """A file of weights into a file of another layout or kind.

    Returns:
        (checkpoint, report): what went through, and how it fits the model that it is of.

    Raises:
        UsageError, DataError: as `read_state_dict`, `parse` and `write`; names or shapes of no whole ResNet.
    """
    checkpoint = parse(read_state_dict(source))
    report = fit(checkpoint)
    _require(report)
    write(target, checkpoint, layout)
    return checkpoint, report


def difference_from_torchvision(model, checkpoint):
    """The largest difference between our features and those of torchvision's own network, over their largest value.

    Args:
        model: an encoder or backbone into which the checkpoint has been loaded.
        checkpoint: a Checkpoint.

    Returns:
        The difference on a fixed batch of two images; None where torch or torchvision is not installed, or torchvision
        has no such network (other widths, other stems).
    """
    arguments = architecture(checkpoint.encoder)["backbone"]
    try:
        torch, resnets = importlib.import_module("torch"), importlib.import_module("torchvision.models.resnet")
    except ImportError:
        return None
    if (arguments["width"], arguments["stem"], arguments["channels"]) != (1, "imagenet", 3):
        return None
    block = resnets.Bottleneck if arguments["depth"] >= 50 else resnets.BasicBlock
    network = resnets.ResNet(block, list(BLOCKS[arguments["depth"]]), groups=arguments["groups"],
                             width_per_group=arguments["width_per_group"])
    network.fc = torch.nn.Identity()
    network.load_state_dict({name: torch.tensor(value) for name, value in _headless(checkpoint.encoder).items()})
    size = model.input_shape[1] or 224
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = network.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    ours = keras.Model(model.input, model.get_layer("features").output)(images, training=False).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _need(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UsageError(f"This kind of file needs the package {package}, which is not installed. "
                         "Install it: pip install moco_tf[torch]") from None


def _line(error):
    return f"{type(error).__name__} {str(error).strip()}".splitlines()[0].rstrip(". ")
