"""PyTorch weights in and out: one name table, read both ways.

Layers carry the names of PyTorch's modules, so a variable's name there is its layer's name and one of `SUFFIXES`.
Files, models and layouts meet in one value, `Checkpoint`:

    .pth, .pth.tar, .safetensors -- read_state_dict, parse --> Checkpoint -- restore, load_backbone --> model
    model -- checkpoint_of --> Checkpoint -- LAYOUTS[layout], write --> .pth, .pth.tar, .safetensors, .pkl
"""

import importlib
import math
import re
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.resnet import BLOCKS
from moco_tf.backbones.vit import Block
from moco_tf.errors import DataError, UsageError
from moco_tf.export.torch_files import PICKLE_FILE, SAFETENSORS_FILE, TORCH_FILES, read_state_dict, write_state_dict
from moco_tf.heads import HEADS, encoder as join, predictor as build_predictor

keras = tf.keras

SUFFIXES = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
            "moving_mean": "running_mean", "moving_variance": "running_var"}
AXES_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}    # kernels: (H, W, in, out) -> (out, in, H, W); (in, out) -> (out, in)
AXES_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
COUNTER = "num_batches_tracked"                 # PyTorch's BatchNorm counts batches, and uses the count for nothing
HEAD = "fc."                                    # ours, and a ResNet's there; a vision transformer's there is VIT_HEAD
VIT_HEAD = "head."
PREDICTOR = "predictor."


class Checkpoint(NamedTuple):
    """What a file or a method holds, in PyTorch's names and layout, but for heads, which are all called HEAD.

    kind: "pretraining", "probe" (backbone and classifier) or "backbone"; encoder, key_encoder: name -> array, without
    prefix, the latter empty if there is none; queue: (K, C) or None; pointer: the row that is written next; predictor:
    name -> array, MoCo v3's, or None; heads: of a vision transformer's attention, which no shape tells; 0: a ResNet.
    """

    kind: str
    encoder: dict
    key_encoder: dict
    queue: Optional[np.ndarray] = None
    pointer: int = 0
    predictor: Optional[dict] = None
    heads: int = 0

    @property
    def version(self):
        """Of the MoCo whose files have such a pre-training checkpoint: "v3", or "v1 or v2"."""
        return "v3" if self.queue is None and _has_norm(self.encoder, HEAD) else "v1 or v2"


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
    """PyTorch name -> variable, for every weight of a functional model, those in layers inside layers included."""
    owners = {}    # the innermost layer comes last
    for layer in model.submodules:
        if isinstance(layer, keras.layers.Layer):
            owners.update((id(variable), layer) for variable in layer.weights)
    return {_torch_name(owners[id(variable)], variable): variable for variable in model.weights}


def _torch_name(layer, variable):
    kind = variable.name.split("/")[-1].split(":")[0]
    return f"{layer.name}.{SUFFIXES[kind]}" if kind in SUFFIXES else kind    # cls_token, pos_embed: timm's own


def named_shapes(model):
    """PyTorch name -> shape in PyTorch's layout, for every weight of a functional model."""
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
    """How a state dict, in PyTorch's names and layout and without prefix, would fit a functional model: a Report."""
    ours = named_shapes(model)
    theirs = {name: tuple(value.shape) for name, value in state.items() if not name.endswith(COUNTER)}
    both = [name for name in ours if name in theirs]
    return Report(
        matched=[name for name in both if ours[name] == theirs[name]],
        missing=[name for name in ours if name not in theirs],
        unexpected=[name for name in theirs if name not in ours],
        misshapen=[(name, ours[name], theirs[name]) for name in both if ours[name] != theirs[name]])


def load_into(model, state, strict=True):
    """Assigns a state dict, in PyTorch's names and layout and without prefix, to a functional model.

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


def parse(state, heads=0):
    """A state dict as read from a file -> Checkpoint.

    Args:
        state: name -> array.
        heads: number of attention heads of a vision transformer; 0: by `_heads`, which knows those of the papers.

    Raises:
        DataError: it is of a model that does not exist here, or of none that is known, or the number of heads must be
            given, or cannot be.
    """
    wrapped = any(name.startswith("module.") for name in state)
    state = {re.sub(r"^module\.", "", name): value for name, value in state.items()}
    if any(name.startswith(CMC) for name in state):
        raise DataError(f"The file must be {KNOWN}. Received: a CMC pre-training file.")
    if any(name.startswith("encoder_q.") for name in state):
        queue = state.get("queue")
        checkpoint = Checkpoint(
            "pretraining", _below("encoder_q.", state), _below("encoder_k.", state),
            None if queue is None else np.ascontiguousarray(queue.T), int(np.ravel(state.get("queue_ptr", 0))[0]))
    elif any(name.startswith("base_encoder.") for name in state):
        predictor = {name: value for name, value in state.items() if name.startswith(PREDICTOR)}
        checkpoint = Checkpoint("pretraining", _below("base_encoder.", state), _below("momentum_encoder.", state),
                                predictor=predictor or None)
    elif "encoder.module.conv1.weight" in state:    # InsDis of the CMC repository: its memory bank is not in the state
        checkpoint = Checkpoint("pretraining", _below("encoder.module.", state), {})
    elif "conv1.weight" in state or "cls_token" in state:
        probed = any(name.startswith((HEAD, VIT_HEAD)) for name in state)
        checkpoint = Checkpoint("probe" if probed else "backbone", state, {})
    else:
        raise DataError(f"The file must be {KNOWN}. Received: {len(state)} names such as "
                        f"{', '.join(list(state)[:3]) or '(none)'}.")
    if "cls_token" not in checkpoint.encoder:
        if heads:
            raise DataError(f"Only a vision transformer has attention heads. Received: heads={heads}, and a ResNet.")
        return checkpoint
    encoders = [{re.sub(rf"^{VIT_HEAD}", HEAD, name): value for name, value in part.items()}
                for part in (checkpoint.encoder, checkpoint.key_encoder)]
    of_moco = wrapped or checkpoint.kind == "pretraining"
    return checkpoint._replace(encoder=encoders[0], key_encoder=encoders[1],
                               heads=heads or _heads(checkpoint.encoder["cls_token"].shape[-1], of_moco))


CMC = ("l_to_ab.", "ab_to_l.", "encoder.module.l_to_ab.", "encoder.l_to_ab.")
KNOWN = "of MoCo v1, v2 or v3, a ResNet in torchvision's names or a vision transformer in timm's"


def _heads(dim, of_moco):
    """The attention heads of a vision transformer of the papers: no shape tells them, and a wrong number computes other
    features without an error."""
    if dim == 768 or (dim == 384 and of_moco):
        return 12
    known = "MoCo v3's has 12, DeiT-S 6" if dim == 384 else "MoCo v3's ViT-S and ViT-B have 12, DeiT-Ti has 3"
    raise DataError("The number of attention heads must be known, which is not in the file, and a wrong one would give "
                    f"other features without an error. Received: a vision transformer of width {dim}, {known}. "
                    "Convert it with --heads set.")


def _below(prefix, state):
    return {name[len(prefix):]: value for name, value in state.items() if name.startswith(prefix)}


def architecture(checkpoint):
    """The arguments with which backbone, head and predictor of a checkpoint are built.

    Returns:
        {"backbone": {"name": one of BACKBONES, ...}, "head": None or {"name": one of HEADS, ...}, "predictor": None or
        arguments of `heads.predictor`}.

    Raises:
        DataError: the shapes are of no backbone that is built here.
    """
    encoder = checkpoint.encoder
    backbone = _vit_of(encoder, checkpoint.heads) if "cls_token" in encoder else _resnet_of(encoder)
    predictor = checkpoint.predictor and _normalized_mlp_of(checkpoint.predictor, PREDICTOR)
    if predictor:
        predictor["last_bn"] = f"{PREDICTOR}{3 * predictor['layers'] - 2}.running_mean" in checkpoint.predictor
    return {"backbone": backbone, "head": _head_of(encoder), "predictor": predictor}


def _resnet_of(encoder):
    blocks = tuple(len({name.split(".")[1] for name in encoder if name.startswith(f"layer{stage}.")})
                   for stage in (1, 2, 3, 4))
    bottleneck = "layer1.0.conv3.weight" in encoder
    try:
        depth = next(d for d, counts in BLOCKS.items() if counts == blocks and (d >= 50) == bottleneck)
        stem_channels, channels, side, _ = encoder["conv1.weight"].shape
        inner = encoder["layer1.0.conv1.weight"].shape[0]
        planes = encoder["layer1.0.conv3.weight"].shape[0] // 4 if bottleneck else inner
        groups = inner // encoder["layer1.0.conv2.weight"].shape[1] if bottleneck else 1
        width_per_group = inner * 64 // (groups * planes) if bottleneck else 64
    except (KeyError, IndexError, StopIteration, ValueError, ZeroDivisionError):
        raise DataError("The file must hold a ResNet-18, 34, 50, 101 or 152 in torchvision's names. "
                        f"Received: names such as {', '.join(list(encoder)[:3])}.") from None
    own_stem = {} if stem_channels == planes else dict(stem_channels=stem_channels)    # CMC's and InsDis' stay at 64
    return dict(name="resnet", depth=depth, width=planes // 64 if planes % 64 == 0 else planes / 64, groups=groups,
                width_per_group=width_per_group, stem="imagenet" if side == 7 else "cifar", channels=channels,
                **own_stem)


def _vit_of(encoder, heads):
    depth = len({name.split(".")[1] for name in encoder if name.startswith("blocks.")})
    stem = "patch" if "patch_embed.proj.weight" in encoder else "conv"
    try:
        _, tokens, dim = encoder["pos_embed"].shape
        kernel = encoder["patch_embed.proj.weight" if stem == "patch" else "patch_embed.proj.0.weight"]
        patch = kernel.shape[2] if stem == "patch" else 16
        ratio = encoder["blocks.0.mlp.fc1.weight"].shape[0] // dim
    except (KeyError, IndexError, ValueError):
        raise DataError("The file must hold a vision transformer with class token and position embedding, in timm's "
                        f"names. Received: names such as {', '.join(list(encoder)[:3])}.") from None
    if dim % heads:
        raise DataError(f"The width of a vision transformer must be a multiple of its heads. Received: width {dim}, "
                        f"{heads} heads.")
    return dict(name="vit", dim=dim, depth=depth, heads=heads, patch=patch, mlp_ratio=ratio, stem=stem,
                size=math.isqrt(tokens - 1) * patch, channels=kernel.shape[1])


def _head_of(encoder):
    if _has_norm(encoder, HEAD):
        return dict(name="projector", **_normalized_mlp_of(encoder, HEAD))
    widths = _widths(encoder, HEAD)
    if not widths:
        return None
    head = dict(name="linear" if f"{HEAD}weight" in encoder else "mlp", dim=widths[-1])
    if head["name"] == "mlp":
        head["hidden_dim"] = widths[0] if len(widths) == 2 else tuple(widths[:-1])
    return head


def _normalized_mlp_of(state, prefix):
    widths = _widths(state, prefix)
    return dict(layers=len(widths), hidden_dim=widths[0], dim=widths[-1])


def _widths(state, prefix):
    """Of the linear layers below a prefix, in order."""
    names = [name for name in state if name.startswith(prefix) and state[name].ndim == 2]
    return [state[name].shape[0] for name in sorted(names, key=_layer_number)]


def _has_norm(state, prefix):
    return any(name.startswith(prefix) and name.endswith("running_mean") for name in state)


def _layer_number(name):
    return int((re.findall(r"\d+", name) or [0])[0])


def backbone_model(built):
    """The backbone of what `architecture` returned."""
    arguments = dict(built["backbone"])
    return BACKBONES[arguments.pop("name")](**arguments)


def fit(checkpoint):
    """The Report of the checkpoint's encoders and predictor against the very models that `architecture` says they are
    of: the first that is not complete, or the encoder's."""
    built = architecture(checkpoint)
    # Not inside a tf.Graph, though shapes are all that is asked for: models made before would not work any more.
    encoder = backbone_model(built)
    if built["head"]:
        arguments = dict(built["head"])
        head = HEADS[arguments.pop("name")]
        encoder = join(encoder, lambda features: head(features, **arguments))
    reports = [match(encoder, state) for state in (checkpoint.encoder, checkpoint.key_encoder) if state]
    if checkpoint.predictor:
        reports.append(match(build_predictor(**built["predictor"]), checkpoint.predictor))
    return next((report for report in reports if not report.complete), reports[0])


def describe(checkpoint):
    """What the checkpoint is, and the encoder it takes, in one sentence."""
    built = architecture(checkpoint)
    what = {"pretraining": f"a MoCo {checkpoint.version} pre-training checkpoint",
            "backbone": "a backbone without a head",
            "probe": "a backbone with a trained classifier, as a linear probe leaves it"}[checkpoint.kind]
    parts = [_call(built["backbone"])]
    if built["head"]:
        parts.append(f"head {_call(built['head'])}")
    if built["predictor"]:
        parts.append(_call(dict(name="predictor", **built["predictor"])))
    if checkpoint.kind == "pretraining":
        parts.append("momentum encoder" if checkpoint.key_encoder else "no momentum encoder")
        if checkpoint.version == "v3":
            parts += [] if checkpoint.predictor else ["no predictor"]
        else:
            parts.append("no queue" if checkpoint.queue is None else f"queue of {len(checkpoint.queue)} keys")
    return f"{what}: {', '.join(parts)}"


def _call(section):
    arguments = ", ".join(f"{name}={value}" for name, value in section.items() if name != "name")
    return f"{section['name']}({arguments})"


def checkpoint_of(method):
    """The Checkpoint of a method: its encoders, and what it has of a queue with its pointer, and of a predictor."""
    key_encoder, predictor, queue = (getattr(method, name, None) for name in ("key_encoder", "predictor", "queue"))
    steps = int(method.optimizer.iterations.numpy()) if method.optimizer else 0
    batches = 2 * steps if predictor else steps    # with a predictor, both views pass through both encoders
    state = Checkpoint(
        "pretraining", state_dict(method.encoder, batches), state_dict(key_encoder, batches) if key_encoder else {},
        predictor=state_dict(predictor, batches) if predictor else None,
        heads=next((layer.heads for layer in method.encoder.layers if isinstance(layer, Block)), 0))
    if queue is None:
        return state
    return state._replace(queue=queue.keys.numpy(), pointer=int(queue.pointer.numpy()))


def restore(method, checkpoint, backbone_only=False):
    """Loads a pre-training checkpoint into a MoCo method.

    Where the file has no momentum encoder, the method's becomes a copy of the encoder; where no queue or no predictor,
    that of the method stays.

    Args:
        method: with `encoder`, `key_encoder` and, by its kind, `queue` or `predictor`.
        checkpoint: a Checkpoint.
        backbone_only: start from a backbone, or a probe's: heads, predictor and queue stay as they are.

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
    key_encoder, predictor, queue = (getattr(method, name, None) for name in ("key_encoder", "predictor", "queue"))
    if checkpoint.queue is not None and (queue is None or checkpoint.queue.shape != tuple(queue.keys.shape)):
        ours = "none" if queue is None else tuple(queue.keys.shape)
        raise DataError("The queue must have as many keys, of as many values, as the method's, "
                        f"{ours}. Received: {checkpoint.queue.shape}. "
                        "Set method.queue_size and head.dim to the file's.")
    if checkpoint.predictor and predictor is None:
        raise DataError("A predictor needs a method that has one, MoCo v3. "
                        f"Received: {describe(checkpoint)}, for a {type(method).__name__}.")
    states = [(method.encoder, checkpoint.encoder), (method.key_encoder, checkpoint.key_encoder or checkpoint.encoder)]
    if checkpoint.predictor:
        states.append((predictor, checkpoint.predictor))
    _require_heads(method.encoder, checkpoint)
    for model, state in states:    # all is well before anything changes
        _require(match(model, state))
    report, *_ = [load_into(model, state) for model, state in states]
    if checkpoint.queue is not None:
        queue.keys.assign(checkpoint.queue)
        queue.pointer.assign(checkpoint.pointer)
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
    _require_heads(model, checkpoint)
    trunk = keras.Model(model.input, model.get_layer("features").output)
    return load_into(trunk, _headless(checkpoint.encoder))


def _require_heads(model, checkpoint):
    """Shapes agree whatever the number of attention heads, so they are compared on their own."""
    ours = {layer.heads for layer in model.layers if isinstance(layer, Block)}
    if ours and checkpoint.heads and ours != {checkpoint.heads}:
        raise DataError("The attention must have as many heads as that which the weights were trained with. "
                        f"Received: a model with {ours.pop()}, a file with {checkpoint.heads}.")


def _headless(encoder):
    return {name: value for name, value in encoder.items() if not name.startswith(HEAD)}


# ---- layouts ----------------------------------------------------------------------------------------------------


def official(checkpoint):
    """The state dict of facebookresearch/moco or moco-v3: of pre-training, or of a linear probe on it."""
    encoder, key_encoder = (_their_head(part, checkpoint) for part in (checkpoint.encoder, checkpoint.key_encoder))
    if checkpoint.kind == "probe":
        return _under("module.", encoder)
    if checkpoint.version == "v3":
        return {**_under("module.base_encoder.", encoder), **_under("module.momentum_encoder.", key_encoder),
                **_under("module.", checkpoint.predictor or {})}
    state = {**_under("module.encoder_q.", encoder), **_under("module.encoder_k.", key_encoder)}
    if checkpoint.queue is not None:
        state["module.queue"] = np.ascontiguousarray(checkpoint.queue.T)
        state["module.queue_ptr"] = np.array([checkpoint.pointer], np.int64)
    return state


def torchvision(checkpoint):
    """The state dict of torchvision's ResNet: the backbone, and the classifier where the checkpoint is a probe's."""
    return dict(checkpoint.encoder) if checkpoint.kind == "probe" else _headless(checkpoint.encoder)


def deit(checkpoint):
    """The state dict of timm's and DeiT's vision transformer, as MoCo v3's converter writes it; a probe's keeps its
    classifier."""
    return _their_head(torchvision(checkpoint), checkpoint)


def detectron2(checkpoint):
    """Arrays by the names of Detectron2's ResNet, as the reference's converter writes them, head and counters too."""
    return {_detectron2_name(name): value for name, value in checkpoint.encoder.items()}


def _detectron2_name(name):
    name = name if name.startswith("layer") else f"stem.{name}"
    name = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\b", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _their_head(encoder, checkpoint):
    theirs = VIT_HEAD if checkpoint.heads else HEAD
    return {re.sub(rf"^{HEAD}", theirs, name): value for name, value in encoder.items()}


def _under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {"official": official, "torchvision": torchvision, "deit": deit, "detectron2": detectron2}


def write(path, checkpoint, layout):
    """Writes a checkpoint in one of LAYOUTS; the suffix says the kind of file. No broken file is ever left.

    .pth, .pth.tar and .pt: PyTorch, for "official" with the state dict under "state_dict" and for "deit" under "model",
    as their own files have it; .safetensors: arrays; .pkl: "detectron2" only.

    Raises:
        UsageError: unknown layout, or a suffix or checkpoint that does not go with it; a package is missing.
        DataError: the file cannot be written.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"The layout must be one of {', '.join(LAYOUTS)}. Received: {layout!r}.")
    suffixes = (PICKLE_FILE,) if layout == "detectron2" else TORCH_FILES + (SAFETENSORS_FILE,)
    if not path.endswith(suffixes):
        raise UsageError(f"A file in layout {layout} must end in {' or '.join(suffixes)}. Received: {path}.")
    if layout not in _layouts_of(checkpoint):
        raise UsageError(f"The layout {layout} does not go with every checkpoint. Received: {describe(checkpoint)}. "
                         f"Use {' or '.join(_layouts_of(checkpoint))}.")
    wrap = {"official": lambda state: {"arch": _name(checkpoint), "state_dict": state},
            "torchvision": dict,
            "deit": lambda state: {"model": state},
            "detectron2": lambda state: {"model": state, "__author__": "MOCO", "matching_heuristics": True}}
    write_state_dict(path, LAYOUTS[layout](checkpoint), wrap[layout])


def _layouts_of(checkpoint):
    """The layouts in which a checkpoint can be written."""
    return [*(["official"] if checkpoint.kind != "backbone" else []),
            *(["deit"] if checkpoint.heads else ["torchvision", "detectron2"])]


def _name(checkpoint):
    """What the references call the architecture."""
    backbone = architecture(checkpoint)["backbone"]
    if backbone["name"] == "resnet":
        return f"resnet{backbone['depth']}"
    sizes = {name: partial.keywords for name, partial in BACKBONES.items() if name.startswith("vit_")}
    return next((name for name, size in sizes.items() if {**backbone, "stem": "patch", **size} == backbone), "vit")


def convert(source, target, layout):
    """A file of weights into a file of another layout or kind.

    Returns:
        (checkpoint, report): what went through, and how it fits the model that it is of.

    Raises:
        UsageError, DataError: as `read_state_dict`, `parse` and `write`; names or shapes of no whole model.
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
    arguments = architecture(checkpoint)["backbone"]
    try:
        torch, resnets = importlib.import_module("torch"), importlib.import_module("torchvision.models.resnet")
    except ImportError:
        return None
    if [arguments.get(key) for key in ("name", "width", "stem", "channels")] != ["resnet", 1, "imagenet", 3]:
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
