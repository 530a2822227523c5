"""Where features come from: a run, a file of weights from PyTorch, or a SavedModel."""

import dataclasses
import hashlib
import json
import os
import typing

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.callbacks import saved_checkpoints, step_of
from moco_tf.errors import DataError, UsageError
from moco_tf.export import torch_weights
from moco_tf.export.exchange import imported_config
from moco_tf.export.torch_files import SAFETENSORS_FILE, TORCH_FILES, read_state_dict
from moco_tf.heads import parts
from moco_tf.losses import at_least_float32
from moco_tf.train import build_encoder, is_run, normalizer, read_config, restore_method, set_precision, view_recipe

keras = tf.keras

SIDES = ("query", "key")
RANDOM = "random:"
FINE_TUNING = "fine_tuning"    # the method of runs whose encoder is that of another path, trained on
WEIGHTS = (*TORCH_FILES, SAFETENSORS_FILE)
METADATA = "moco_tf.json"    # beside saved_model.pb: what `moco-tf export` says of the model


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder to evaluate, with weights of its own on the current strategy's devices.

    Attributes:
        path: where it came from.
        description: what it is, in a few words.
        models: {"backbone": Keras layer, images -> (B, D); "embedding": the same with the head, where there is one}.
        normalize: uint8 images (B, size, size, channels) -> what the models take.
        size: side of the images in pixels.
        config: of the run, or the one that a file's encoder would be trained with; None for a SavedModel.
        step: of the run's checkpoint; None for others.
    """

    path: str
    description: str
    models: typing.Mapping
    normalize: typing.Callable
    size: int
    config: typing.Any = None
    step: typing.Optional[int] = None

    @property
    def width(self):
        """D, of the backbone's features."""
        return int(self.models["backbone"].output_shape[-1])

    @property
    def channels(self):
        """Of the images."""
        return int(self.models["backbone"].input_shape[-1] or 3)

    def rows(self, images, features="backbone", training=False):
        """uint8 images (B, size, size, channels) -> (B, D) or (B, C), at least float32, not normalised.

        Raises:
            UsageError: `features` that this encoder does not have.
        """
        if features not in self.models:
            raise UsageError(f"The features must be one of {', '.join(self.models)}. Received: {features!r} of "
                             f"{self.path}.")
        return at_least_float32(self.models[features](self.normalize(images), training=training))

    def fingerprint(self):
        """A digest of the bytes of all weights, in their order, and of a SavedModel's graph; equal only where every bit is."""
        digest = hashlib.sha256()
        graph = f"{self.path}/saved_model.pb"
        if self.config is None and tf.io.gfile.exists(graph):
            with tf.io.gfile.GFile(graph, "rb") as file:
                digest.update(file.read())
        for variable in max(self.models.values(), key=lambda model: len(model.weights)).weights:
            digest.update(tf.io.serialize_tensor(tf.convert_to_tensor(variable)).numpy())
        return digest.hexdigest()


def open_encoder(path, side="query", size=0, precision="", bn_group_size=None, seed=0, **changes):
    """The encoder of a run's workdir, of a .pth, .pt or .safetensors file, or of a SavedModel's folder.

    "random:RECIPE" is the untrained encoder of a recipe, to compare with. The run may be a fine-tuning; its encoder is
    the backbone, and what it was fine-tuned from must still be there.

    A SavedModel must have a signature "features" that takes images (B, S, S, 3) in [0, 1] as its only argument and
    returns (B, D); one of `moco-tf export` has. "embedding" is used where there is such.

    Args:
        path: may be gs://, but for files of PyTorch.
        side: "query", or "key" for the momentum encoder, of a run.
        size: of the images; 0: the one the encoder was made for.
        precision: to compute in, as in a config; "": the run's.
        bn_group_size: images that share batch statistics, where the backbone is to train on; as in a config. None: as in
            the run.
        seed: of what the backbone draws while it trains (stochastic depth).
        changes: arguments of the backbone to differ from those it was trained with, such as `drop_path`.

    Raises:
        UsageError: nothing of the kind at this path; a side or a backbone argument that it does not have.
        DataError: a file that cannot be read, or of another model.
    """
    if side not in SIDES:
        raise UsageError(f"The encoder's side must be one of {', '.join(SIDES)}. Received: {side!r}.")
    changes = dict(size=size, precision=precision, bn_group_size=bn_group_size, seed=seed, backbone=changes)
    if path.startswith(RANDOM):
        return _of_recipe(path, changes)
    if path.endswith(WEIGHTS):
        return _of_file(path, side, changes)
    if is_run(path):
        return (_of_fine_tuning if read_config(path).method.name == FINE_TUNING else _of_run)(path, side, changes)
    if side == "query" and tf.io.gfile.exists(f"{path}/saved_model.pb"):
        if changes["backbone"]:
            raise UsageError(f"The backbone of a SavedModel is what it is. Received: {path} and "
                             f"{', '.join(changes['backbone'])} to change in it. Start from the run's workdir, or leave these out.")
        return _of_saved_model(path, size)
    raise UsageError("An encoder is a run's workdir (with a config.json), a SavedModel's folder (side query), or a file in "
                     f"{', '.join(WEIGHTS)}. Received: {path}, which is none of these.")


def read_own_config(path):
    """The config that comes with an encoder's path: a run's or a recipe's; None where there is none."""
    if path.startswith(RANDOM):
        return configs.load(path[len(RANDOM):])
    return read_config(path) if is_run(path) else None


def _of_recipe(path, changes):
    config = read_own_config(path)
    changed = _changed(config, **changes)
    set_precision(changed.precision)
    keras.utils.set_random_seed(config.seed)
    return Encoder(path, f"{config.method.name}, untrained", parts(build_encoder(changed)),
                   normalizer(view_recipe(config)), changed.views.size, config)


def _of_run(path, side, changes):
    method, config, step = restore_method(path)
    encoder = method.encoder if side == "query" else getattr(method, "key_encoder", None)
    if encoder is None:
        raise UsageError(f"A key encoder belongs to methods that have a momentum encoder. Received: {path}, of "
                         f"{config.method.name}. Use the query encoder.")
    changed = _changed(config, **changes)
    if changed != config:
        encoder = _rebuilt(changed, torch_weights.state_dict(encoder), config)
    return Encoder(path, f"{config.method.name}, {side} encoder at step {step}", parts(encoder),
                   normalizer(view_recipe(config)), changed.views.size, config, step)


def _of_fine_tuning(path, side, changes):
    """The backbone that a run has fine-tuned, with its newest weights; all else is of the encoder it began with."""
    config, saved = read_config(path), saved_checkpoints(f"{path}/checkpoints")
    if side != "query" or not saved:
        raise UsageError("Fine-tuning has one encoder, the query encoder, once it has saved a checkpoint. Received: "
                         f"{path}, side {side}, {len(saved)} checkpoints.")
    group = changes["bn_group_size"]
    encoder = open_encoder(config.encoder, config.side, changes["size"] or config.views.size,
                           changes["precision"] or config.precision, config.bn_group_size if group is None else group,
                           changes["seed"], **{**config.get("backbone", {}), **changes["backbone"]})
    backbone = encoder.models["backbone"]
    try:
        tf.train.Checkpoint(method=tf.train.Checkpoint(encoder=backbone)).restore(
            saved[-1]).assert_existing_objects_matched()
    except (tf.errors.OpError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        raise DataError("The fine-tuned weights must be those of the encoder they were trained from. Received: "
                        f"{saved[-1]} for {config.encoder} with images of {encoder.size} pixels: "
                        f"{str(error).splitlines()[0]}.") from None
    step = step_of(saved[-1])
    return dataclasses.replace(encoder, path=path, description=f"fine-tuned to step {step} from: {encoder.description}",
                               models={"backbone": backbone}, step=step)


def _of_file(path, side, changes):
    checkpoint = torch_weights.parse(read_state_dict(path))
    config = imported_config(checkpoint)
    state = checkpoint.encoder if side == "query" else checkpoint.key_encoder
    if not state:
        raise UsageError(f"The file must hold a key encoder. Received: {path}, without one. Use the query encoder.")
    changed = _changed(config, **changes)
    whole = checkpoint.kind == "pretraining"
    if whole:
        encoder = _rebuilt(changed, state, config)
    else:
        set_precision(changed.precision)
        encoder = build_encoder(changed)
        torch_weights.load_backbone(encoder, checkpoint, allow_probe=True)
    models = parts(encoder)
    return Encoder(path, torch_weights.describe(checkpoint), models if whole else {"backbone": models["backbone"]},
                   normalizer(view_recipe(config)), changed.views.size, config)


def _changed(config, size, precision, bn_group_size, seed, backbone):
    changed = config.copy_and_resolve_references().unlock()
    changed.views.size = size or config.views.size
    changed.precision = precision or config.precision
    changed.bn_group_size = config.bn_group_size if bn_group_size is None else bn_group_size
    changed.seed = seed
    changed.backbone.update(backbone)
    return changed.lock()


def _rebuilt(changed, state, config):
    """The encoder of a changed config with the weights of a state dict; positions that are computed follow the size."""
    set_precision(changed.precision)
    keras.utils.set_random_seed(changed.seed)
    encoder = build_encoder(changed)
    own = torch_weights.state_dict(encoder)
    if "pos_embed" in own and own["pos_embed"].shape != state["pos_embed"].shape:
        if config.backbone.get("trainable_positions"):
            raise UsageError("Learned positions belong to one image size. Received: an encoder for images of "
                             f"{config.views.size} pixels, and {changed.views.size} asked for. Keep its size.")
        state = {**state, "pos_embed": own["pos_embed"]}
    torch_weights.load_into(encoder, state)
    return encoder


# ---------------------------------------------------------------------------------------------- SavedModels

class SavedLayer(keras.layers.Layer):
    """A signature of a loaded SavedModel as a layer; with `training=True` the model itself is called, if it can be.

    Args:
        loaded: what tf.saved_model.load returned.
        signature: name of a signature with one image argument and one output.

    Raises:
        UsageError: while tracing with `training=True`, for a model that only has signatures, or for its embedding.
    """

    def __init__(self, loaded, signature):
        super().__init__(name=signature)
        self.function = loaded.signatures[signature]
        self.loaded = loaded
        self.trains = signature == "features" and callable(loaded)
        (self.argument, self.spec), = self.function.structured_input_signature[1].items()
        self.variables_of_model = list(self.function.variables)    # as an attribute, so that Keras counts them in

    @property
    def input_shape(self):
        return tuple(self.spec.shape)

    @property
    def output_shape(self):
        return tuple(next(iter(self.function.structured_outputs.values())).shape)

    def call(self, images, training=False):
        images = tf.cast(images, self.spec.dtype)
        if not training:
            result, = self.function(**{self.argument: images}).values()
            return result
        if not self.trains:
            raise UsageError("To train a SavedModel's features it must be callable as (images, training=True), as one "
                             f"of `moco-tf export` is. Received: the signature {self.name!r} of another.")
        return self.loaded(images, training=True)


def _of_saved_model(path, size):
    try:
        loaded = tf.saved_model.load(path)
    except (tf.errors.OpError, OSError, ValueError, KeyError) as error:
        raise DataError(f"The SavedModel must be whole. Received: {path}: {str(error).splitlines()[0]}.") from None
    names = [name for name in ("features", "embedding") if name in loaded.signatures]
    if "features" not in names:
        raise UsageError('A SavedModel must have a signature "features", images in [0, 1] to (B, D). Received: '
                         f"{path}, with {', '.join(loaded.signatures) or 'no signature'}. `moco-tf export` writes one.")
    layers = {}
    for name in names:
        takes = loaded.signatures[name].structured_input_signature[1]
        gives = list(loaded.signatures[name].structured_outputs.values())
        if len(takes) != 1 or len(gives) != 1 or next(iter(takes.values())).shape.rank != 4 \
                or gives[0].shape.rank != 2 or gives[0].shape[1] is None:
            raise UsageError(f"The signature {name!r} must take images (B, S, S, 3) and return (B, D). Received: "
                             f"{path}, whose {name!r} takes {_shapes(takes.values())} and returns {_shapes(gives)}.")
        layers["backbone" if name == "features" else name] = SavedLayer(loaded, name)
    facts, fixed = read_metadata(path), layers["backbone"].spec.shape[1]
    if size and fixed and size != fixed:
        raise UsageError(f"This SavedModel takes images of {fixed} pixels. Received: {path} with size {size}. Set "
                         f"views.size to {fixed}, or export the encoder with --size={size}.")
    size = size or fixed or facts.get("preprocessing", {}).get("size") or 224
    return Encoder(path, "SavedModel", layers, _zero_to_one, size)


def read_metadata(path):
    """What `moco-tf export` wrote beside a SavedModel, as a dict; empty for others."""
    file = os.path.join(path, METADATA)
    if not tf.io.gfile.exists(file):
        return {}
    with tf.io.gfile.GFile(file) as content:
        return json.load(content)


def _zero_to_one(images):
    return tf.cast(images, tf.float32) / 255.0


def _shapes(specs):
    return ", ".join(str(tuple(spec.shape)) for spec in specs) or "nothing"
