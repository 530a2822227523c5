"""PyTorch weights in and out: one name table, read both ways.

Layers carry the names of PyTorch's modules, so a variable's name there is its layer's name and one of `SUFFIXES`.
Files, models and layouts meet in one value, `Checkpoint`:

    .pth, .pth.tar, .safetensors -- read_state_dict, parse --> Checkpoint -- restore, load_backbone --> model
    model -- checkpoint_of --> Checkpoint -- LAYOUTS[layout], write --> .pth, .pth.tar, .safetensors, .pkl
"""

import functools
import importlib
import math
import re
from typing import NamedTuple, Optional

import numpy as np
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.backbones.resnet import BLOCKS
from moco_tf.backbones.vit import Block
from moco_tf.criteria import NCE
from moco_tf.errors import DataError, UsageError
from moco_tf.export.torch_files import PICKLE_FILE, SAFETENSORS_FILE, TORCH_FILES, write_state_dict
from moco_tf.heads import HEADS, encoder as join, predictor as build_predictor
from moco_tf.methods.end_to_end import EndToEnd

keras = tf.keras

SUFFIXES = {"kernel": "weight", "bias": "bias", "gamma": "weight", "beta": "bias",
            "moving_mean": "running_mean", "moving_variance": "running_var"}
AXES_TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0)}    # kernels: (H, W, in, out) -> (out, in, H, W); (in, out) -> (out, in)
AXES_FROM_TORCH = {4: (2, 3, 1, 0), 2: (1, 0)}
COUNTER = "num_batches_tracked"                 # PyTorch's BatchNorm counts batches, and uses the count for nothing
HEAD = "fc."                                    # ours, and a ResNet's there; a vision transformer's there is VIT_HEAD
VIT_HEAD = "head."
ALEXNET_HEAD = "fc8.0."
HEAD_NAME = re.compile(rf"^([^.]+\.)?{re.escape(HEAD)}")    # with the branch's name before it, where there is one
PREDICTOR = "predictor."
CMC_BRANCHES = ("l_to_ab", "ab_to_l")           # CMC's code has no others
CMC_BANKS = {1: ("memory",), 2: ("memory_l", "memory_ab")}    # InsDis's and CMC's names in the same code


class Banks(NamedTuple):
    """What InsDis and CMC keep beside the encoder, in the order of the encoder's branches.

    rows: (n, C) each, none where they are not in the file; partitions: the constants Z of NCE, each of a branch's
    queries against the other's bank, below 0 where unset; num_negatives, temperature, momentum: of the method.
    """

    rows: tuple = ()
    partitions: tuple = ()
    num_negatives: int = 0
    temperature: float = 0.0
    momentum: float = 0.0


class Checkpoint(NamedTuple):
    """What a file or a method holds, in PyTorch's names and layout, but for heads, which are all called HEAD.

    kind: "pretraining", "probe" (backbone and classifier) or "backbone"; encoder, key_encoder: name -> array, without
    prefix but that of a branch, the latter empty if there is none; queue: (K, C) or None; pointer: the row that is
    written next; predictor: name -> array, MoCo v3's, or None; heads: of a vision transformer's attention, which no
    shape tells; 0: no transformer; banks: InsDis's and CMC's, else None; space: of the colours that branches see;
    "": not known; end_to_end: whether the key encoder learns as the encoder does, which a run knows and no file tells.
    """

    kind: str
    encoder: dict
    key_encoder: dict
    queue: Optional[np.ndarray] = None
    pointer: int = 0
    predictor: Optional[dict] = None
    heads: int = 0
    banks: Optional[Banks] = None
    space: str = ""
    end_to_end: bool = False

    @property
    def method(self):
        """Whose pre-training has such a checkpoint: "CMC", "InsDis", "the end-to-end mechanism", "MoCo v3" or "MoCo v1 or
        v2"."""
        if "" not in self.branches:
            return "CMC"
        if self.banks is not None:
            return "InsDis"
        if self.end_to_end:
            return "the end-to-end mechanism"
        return "MoCo v3" if self.queue is None and _has_norm(self.encoder, HEAD) else "MoCo v1 or v2"

    @property
    def branches(self):
        """{name: what of the encoder is its own, without the name}, in order; {"": all} where there are no branches."""
        firsts = [re.fullmatch(r"([^.]+)\.(conv1|conv_block_1\.0)\.weight", name) for name in self.encoder]
        return {first[1]: _below(f"{first[1]}.", self.encoder) for first in firsts if first} or {"": self.encoder}


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
    if _is_of_cmc(state):
        checkpoint = _of_cmc(state)
    elif any(name.startswith("encoder_q.") for name in state):
        queue = state.get("queue")
        checkpoint = Checkpoint(
            "pretraining", _below("encoder_q.", state), _below("encoder_k.", state),
            None if queue is None else np.ascontiguousarray(queue.T), int(np.ravel(state.get("queue_ptr", 0))[0]))
    elif any(name.startswith("base_encoder.") for name in state):
        predictor = {name: value for name, value in state.items() if name.startswith(PREDICTOR)}
        checkpoint = Checkpoint("pretraining", _below("base_encoder.", state), _below("momentum_encoder.", state),
                                predictor=predictor or None)
    elif "conv1.weight" in state or "cls_token" in state:
        probed = any(name.startswith((HEAD, VIT_HEAD)) for name in state)
        checkpoint = Checkpoint("probe" if probed else "backbone", state, {})
    else:
        raise DataError(f"The file must be {KNOWN}. Received: {len(state)} names such as "
                        f"{', '.join(list(state)[:3]) or '(none)'}.")
    if "cls_token" not in checkpoint.encoder:
        if heads:
            raise DataError("Only a vision transformer has attention heads. "
                            f"Received: heads={heads}, for another network.")
        return checkpoint
    encoders = [{re.sub(rf"^{VIT_HEAD}", HEAD, name): value for name, value in part.items()}
                for part in (checkpoint.encoder, checkpoint.key_encoder)]
    of_moco = wrapped or checkpoint.kind == "pretraining"
    return checkpoint._replace(encoder=encoders[0], key_encoder=encoders[1],
                               heads=heads or _heads(checkpoint.encoder["cls_token"].shape[-1], of_moco))


KNOWN = "of MoCo v1, v2 or v3, InsDis or CMC, a ResNet in torchvision's names or a vision transformer in timm's"


def _is_of_cmc(state):
    names = [re.sub(r"^encoder\.(module\.)?", "", name) for name in state]
    return any(name.startswith((*CMC_BRANCHES, "contrast.")) for name in names) \
        or any(name in state for name in ("encoder.conv1.weight", "encoder.module.conv1.weight"))


def _of_cmc(state):
    """The Checkpoint of a file of CMC's code: of CMC, InsDis or that code's MoCo."""
    contrast, key_encoder = _below("contrast.", state), _cmc_encoder(_below("model_ema.", state))
    encoder = _cmc_encoder({name: value for name, value in state.items()
                            if not name.startswith(("contrast.", "model_ema.", "opt."))})
    kind = "pretraining" if any(HEAD_NAME.match(name) for name in encoder) else "backbone"
    checkpoint = Checkpoint(kind, encoder, key_encoder, space=str(state.get("opt.view", "")))
    if "memory" in contrast and np.size(contrast.get("params", ())) == 1:    # MoCo; its place in the queue is not saved
        return checkpoint._replace(queue=contrast["memory"])
    return checkpoint._replace(banks=_banks_of(contrast) if contrast else Banks())


def _cmc_encoder(state):
    """The encoder in a model of CMC's code, which wraps it once or twice; the branches in their order, which a file of
    another kind than PyTorch's does not keep."""
    names = {name: re.sub(r"^(module\.)?(encoder\.)?(module\.)?", "", name) for name in state}
    encoder = {re.sub(rf"^((\w+\.)?){re.escape(ALEXNET_HEAD)}", rf"\1{HEAD}", short): state[name]
               for name, short in names.items()}
    halves = [_under(f"{branch}.", _below(f"{branch}.", encoder)) for branch in CMC_BRANCHES]
    return {**halves[0], **halves[1], **encoder}


def _banks_of(contrast):
    rows = [contrast[name] for names in CMC_BANKS.values() for name in names if name in contrast]
    params = np.ravel(contrast.get("params", ()))
    if not rows or len(params) != 3 + len(rows):
        raise DataError("The memory of CMC or InsDis must hold memory, or memory_l and memory_ab, and params: K, T, a "
                        f"Z for each, momentum. Received: {', '.join(contrast)}, with {len(params)} params.")
    negatives, temperature, *partitions, momentum = params
    return Banks(tuple(rows), tuple(map(float, partitions)), int(negatives), _decimal(temperature), _decimal(momentum))


def _decimal(number):
    """The shortest decimal number that rounds to this float32, which is what somebody typed."""
    return float(str(np.float32(number)))


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
        {"branches": ((name, channels), ...), as of a config, () without; "backbone": {"name": one of BACKBONES, ...},
        without its channels where there are branches; "head": None or {"name": one of HEADS, ...}; "predictor": None or
        arguments of `heads.predictor`}.

    Raises:
        DataError: the shapes are of no backbone that is built here, or of branches unlike each other.
    """
    parts = {name: (_backbone_of(own, checkpoint.heads), _head_of(own)) for name, own in checkpoint.branches.items()}
    branches = tuple((name, backbone.pop("channels")) for name, (backbone, _) in parts.items() if name)
    (backbone, head), *others = parts.values()
    if any(other != (backbone, head) for other in others):
        raise DataError("The branches of an encoder must be alike but for their channels. "
                        f"Received: {', '.join(f'{name} {_call(part)}' for name, (part, _) in parts.items())}.")
    predictor = checkpoint.predictor and _normalized_mlp_of(checkpoint.predictor, PREDICTOR)
    if predictor:
        predictor["last_bn"] = f"{PREDICTOR}{3 * predictor['layers'] - 2}.running_mean" in checkpoint.predictor
    return {"branches": branches, "backbone": backbone, "head": head, "predictor": predictor}


def _backbone_of(encoder, heads):
    if "cls_token" in encoder:
        return _vit_of(encoder, heads)
    return _alexnet_of(encoder) if "conv_block_1.0.weight" in encoder else _resnet_of(encoder)


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


def _alexnet_of(encoder):
    try:
        side = math.isqrt(encoder["fc6.0.weight"].shape[1] // encoder["conv_block_5.0.weight"].shape[0])
        channels = encoder["conv_block_1.0.weight"].shape[1]
    except KeyError as missing:
        raise DataError(f"The file must hold CMC's AlexNet. Received: one without {missing}.") from None
    return dict(name="alexnet", size=32 * (side + 1), channels=channels)    # one of the 32 sizes with maps of this side


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
    build = BACKBONES[arguments.pop("name")]
    if not built["branches"]:
        return build(**arguments)
    return branched_backbone(built["branches"], lambda channels: build(channels=channels, **arguments),
                             arguments.get("size"))


def fit(checkpoint):
    """The Report of the checkpoint's encoders and predictor against the very models that `architecture` says they are
    of: the first that is not complete, or the encoder's."""
    built = architecture(checkpoint)
    # Not inside a tf.Graph, though shapes are all that is asked for: models made before would not work any more.
    encoder = backbone_model(built)
    if built["head"]:
        arguments, branches = dict(built["head"]), built["branches"]
        head = functools.partial(HEADS[arguments.pop("name")], **arguments)
        encoder = join(encoder, functools.partial(branched_head, branches, head) if branches else head)
    reports = [match(encoder, state) for state in (checkpoint.encoder, checkpoint.key_encoder) if state]
    if checkpoint.predictor:
        reports.append(match(build_predictor(**built["predictor"]), checkpoint.predictor))
    return next((report for report in reports if not report.complete), reports[0])


def describe(checkpoint):
    """What the checkpoint is, and the encoder it takes, in one sentence."""
    built = architecture(checkpoint)
    what = {"pretraining": f"a pre-training checkpoint of {checkpoint.method}",
            "backbone": "a backbone without a head",
            "probe": "a backbone with a trained classifier, as a linear probe leaves it"}[checkpoint.kind]
    parts = [f"{name} ({channels} channel{'s' * (channels > 1)})" for name, channels in built["branches"]]
    if parts:
        parts = [f"{' and '.join(parts)} of {checkpoint.space or 'a colour space that is not named, taken for Lab'}"]
    parts.append(_call(built["backbone"]))
    if built["head"]:
        parts.append(f"head {_call(built['head'])}")
    if built["predictor"]:
        parts.append(_call(dict(name="predictor", **built["predictor"])))
    if checkpoint.kind == "pretraining":
        parts += _memory_parts(checkpoint)
    return f"{what}: {', '.join(parts)}"


def _memory_parts(checkpoint):
    banks, queue = checkpoint.banks, checkpoint.queue
    if banks is not None:
        if not banks.rows:
            return ["no memory bank"]
        partitions = " and ".join(f"{value:.6g}" if value > 0 else "unset" for value in banks.partitions)
        count = len(banks.rows)
        return [f"{count} memory bank{'s' * (count > 1)} of {len(banks.rows[0])} rows", f"K {banks.num_negatives}",
                f"T {banks.temperature:g}", f"momentum {banks.momentum:g}", f"Z {partitions}"]
    if checkpoint.end_to_end:
        return ["keys of an encoder that learns too", "no queue"]
    momentum = "momentum encoder" if checkpoint.key_encoder else "no momentum encoder"
    if checkpoint.method == "MoCo v3":
        return [momentum, *([] if checkpoint.predictor else ["no predictor"])]
    return [momentum, "no queue" if queue is None else f"queue of {len(queue)} keys"]


def _call(section):
    arguments = ", ".join(f"{name}={value}" for name, value in section.items() if name != "name")
    return f"{section['name']}({arguments})"


def checkpoint_of(method, space=""):
    """The Checkpoint of a method: its encoders, and what it has of a queue with its pointer, banks and a predictor.

    `space` is the colour space of its views, which no method knows.
    """
    key_encoder, predictor, queue = (getattr(method, name, None) for name in ("key_encoder", "predictor", "queue"))
    steps = int(method.optimizer.iterations.numpy()) if method.optimizer else 0
    batches = 2 * steps if predictor else steps    # with a predictor, both views pass through both encoders
    state = Checkpoint(
        "pretraining", state_dict(method.encoder, batches), state_dict(key_encoder, batches) if key_encoder else {},
        predictor=state_dict(predictor, batches) if predictor else None,
        heads=next((layer.heads for layer in method.encoder.layers if isinstance(layer, Block)), 0), space=space or "",
        end_to_end=isinstance(method, EndToEnd))
    if hasattr(method, "banks"):
        partitions = tuple(float(criterion.partition.numpy()) if isinstance(criterion, NCE) else -1.0
                           for criterion in method.criteria)
        return state._replace(banks=Banks(tuple(bank.rows.numpy() for bank in method.banks), partitions,
                                          method.num_negatives, method.temperature, method.banks[0].momentum))
    if queue is None:
        return state
    return state._replace(queue=queue.keys.numpy(), pointer=int(queue.pointer.numpy()))


def restore(method, checkpoint, backbone_only=False):
    """Loads a pre-training checkpoint into a method.

    Where the file has no momentum encoder, the method's becomes a copy of the encoder; where no queue, no banks or no
    predictor, those of the method stay.

    Args:
        method: with `encoder` and, by its kind, `key_encoder`, `queue`, `banks` and `criteria`, or `predictor`.
        checkpoint: a Checkpoint.
        backbone_only: start from a backbone, or a probe's: heads, predictor and queue stay as they are.

    Returns:
        The Report of the encoder.

    Raises:
        DataError: another architecture, queue or banks; not a pre-training checkpoint, unless `backbone_only`.
    """
    encoders = [method.encoder, *([method.key_encoder] if hasattr(method, "key_encoder") else [])]
    if backbone_only:
        report, *_ = [_load_backbone(encoder, checkpoint) for encoder in encoders]
        return report
    if checkpoint.kind != "pretraining":
        raise DataError("Pre-training goes on from a pre-training checkpoint. "
                        f"Received: {describe(checkpoint)}. To start from its backbone, ask for the backbone only.")
    predictor, queue = getattr(method, "predictor", None), getattr(method, "queue", None)
    if checkpoint.queue is not None and (queue is None or checkpoint.queue.shape != tuple(queue.keys.shape)):
        ours = "none" if queue is None else tuple(queue.keys.shape)
        raise DataError("The queue must have as many keys, of as many values, as the method's, "
                        f"{ours}. Received: {checkpoint.queue.shape}. "
                        "Set method.queue_size and head.dim to the file's.")
    if checkpoint.predictor and predictor is None:
        raise DataError("A predictor needs a method that has one, MoCo v3. "
                        f"Received: {describe(checkpoint)}, for a {type(method).__name__}.")
    _require_banks(method, checkpoint.banks or Banks())
    states = list(zip(encoders, (checkpoint.encoder, checkpoint.key_encoder or checkpoint.encoder)))
    if checkpoint.predictor:
        states.append((predictor, checkpoint.predictor))
    _require_heads(method.encoder, checkpoint)
    for model, state in states:    # all is well before anything changes
        _require(match(model, state))
    report, *_ = [load_into(model, state) for model, state in states]
    if checkpoint.queue is not None:
        queue.keys.assign(checkpoint.queue)
        queue.pointer.assign(checkpoint.pointer)
    if checkpoint.banks and checkpoint.banks.rows:
        for bank, rows in zip(method.banks, checkpoint.banks.rows):
            bank.rows.assign(rows)
        for criterion, partition in zip(method.criteria, checkpoint.banks.partitions):
            if isinstance(criterion, NCE):
                criterion.partition.assign(partition)
    return report


def _require_banks(method, banks):
    ours = [(bank.size, bank.dim) for bank in getattr(method, "banks", ())]
    theirs = [tuple(rows.shape) for rows in banks.rows]
    if theirs and ours != theirs:
        raise DataError("The memory banks must be as many and as large as the method's, "
                        f"{ours or 'none'}. Received: {theirs}. Set method.bank_size and head.dim to the file's.")


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
    return {name: value for name, value in encoder.items() if not HEAD_NAME.match(name)}


# ---- layouts ----------------------------------------------------------------------------------------------------


def official(checkpoint):
    """The state dict of facebookresearch/moco or moco-v3: of pre-training, or of a linear probe on it."""
    encoder, key_encoder = (_their_head(part, checkpoint) for part in (checkpoint.encoder, checkpoint.key_encoder))
    if checkpoint.kind == "probe":
        return _under("module.", encoder)
    if checkpoint.method == "MoCo v3":
        return {**_under("module.base_encoder.", encoder), **_under("module.momentum_encoder.", key_encoder),
                **_under("module.", checkpoint.predictor or {})}
    state = {**_under("module.encoder_q.", encoder), **_under("module.encoder_k.", key_encoder)}
    if checkpoint.queue is not None:
        state["module.queue"] = np.ascontiguousarray(checkpoint.queue.T)
        state["module.queue_ptr"] = np.array([checkpoint.pointer], np.int64)
    return state


def cmc(checkpoint):
    """The state of HobbitLong/CMC's files, as `read_state_dict` returns it: of CMC, InsDis, or MoCo with a linear head.

    A queue begins with its oldest key, because that code does not save its place. It has no queues for branches: of
    these, only the encoders are written.
    """
    encoder, key_encoder = (_under("encoder.module.", _cmc_head(part))
                            for part in (checkpoint.encoder, checkpoint.key_encoder))
    contrast, banks = {}, checkpoint.banks or Banks()
    if banks.rows:
        contrast = dict(zip(CMC_BANKS[len(banks.rows)], banks.rows))
        contrast["params"] = np.array([banks.num_negatives, banks.temperature, *banks.partitions, banks.momentum],
                                      np.float32)
    elif checkpoint.queue is not None and checkpoint.method != "CMC":
        contrast = {"params": np.array([-1], np.int64),    # Z, which it then estimates anew
                    "memory": np.roll(checkpoint.queue, -checkpoint.pointer, axis=0)}
    return {**encoder, **_under("model_ema.", key_encoder), **_under("contrast.", contrast)}


def _cmc_head(encoder):
    theirs = ALEXNET_HEAD if any("fc6." in name for name in encoder) else HEAD
    return {HEAD_NAME.sub(lambda found: f"{found[1] or ''}{theirs}", name, count=1): value
            for name, value in encoder.items()}


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


LAYOUTS = {"official": official, "cmc": cmc, "torchvision": torchvision, "deit": deit, "detectron2": detectron2}
SUFFIXES_OF = {"cmc": TORCH_FILES, "detectron2": (PICKLE_FILE,)}    # of the others: PyTorch's and safetensors'


def write(path, checkpoint, layout):
    """Writes a checkpoint in one of LAYOUTS; the suffix says the kind of file. No broken file is ever left.

    .pth, .pth.tar and .pt: PyTorch, for "official" with the state dict under "state_dict", for "deit" under "model",
    and for "cmc" under "model", "model_ema" and "contrast", as their own files have it, without the optimizer's state;
    .safetensors: arrays, not of "cmc"; .pkl: "detectron2" only.

    Raises:
        UsageError: unknown layout, or a suffix or checkpoint that does not go with it; a package is missing.
        DataError: the file cannot be written.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"The layout must be one of {', '.join(LAYOUTS)}. Received: {layout!r}.")
    suffixes = SUFFIXES_OF.get(layout, (*TORCH_FILES, SAFETENSORS_FILE))
    if not path.endswith(suffixes):
        raise UsageError(f"A file in layout {layout} must end in {' or '.join(suffixes)}. Received: {path}.")
    possible = _layouts_of(checkpoint)
    if layout not in possible:
        use = f"Use {' or '.join(possible)}." if possible else (
            f"None does: of branches, {' and '.join(CMC_BRANCHES)} alone, with linear heads, go into layout cmc.")
        raise UsageError(f"The layout {layout} does not go with every checkpoint. "
                         f"Received: {describe(checkpoint)}. {use}")
    wrap = {"official": lambda state: {"arch": _name(checkpoint), "state_dict": state},
            "cmc": lambda state: _cmc_file(state, checkpoint.space),
            "torchvision": dict,
            "deit": lambda state: {"model": state},
            "detectron2": lambda state: {"model": state, "__author__": "MOCO", "matching_heuristics": True}}
    write_state_dict(path, LAYOUTS[layout](checkpoint), wrap[layout])


def _cmc_file(state, space):
    parts = {part: _below(f"{part}.", state) for part in ("contrast", "model_ema")}
    model = {name: value for name, value in state.items() if not name.startswith(tuple(f"{part}." for part in parts))}
    return {"opt": {"view": space} if space else {}, "model": model, "contrast": parts["contrast"],
            **({"model_ema": parts["model_ema"]} if parts["model_ema"] else {})}


def _layouts_of(checkpoint):
    """The layouts in which a checkpoint can be written."""
    built = architecture(checkpoint)
    linear = checkpoint.kind == "pretraining" and built["head"] and built["head"]["name"] == "linear"
    of_cmc = ["cmc"] if linear and not checkpoint.heads else []
    if built["branches"]:
        return of_cmc if tuple(name for name, _ in built["branches"]) == CMC_BRANCHES else []
    ours = ["official"] if checkpoint.kind != "backbone" else []
    if checkpoint.heads:
        return [*ours, "deit"]
    return [*ours, *of_cmc, *(["torchvision", "detectron2"] if built["backbone"]["name"] == "resnet" else [])]


def _name(checkpoint):
    """What the references call the architecture."""
    backbone = architecture(checkpoint)["backbone"]
    if backbone["name"] == "resnet":
        return f"resnet{backbone['depth']}"
    sizes = {name: partial.keywords for name, partial in BACKBONES.items() if name.startswith("vit_")}
    return next((name for name, size in sizes.items() if {**backbone, "stem": "patch", **size} == backbone), "vit")


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
