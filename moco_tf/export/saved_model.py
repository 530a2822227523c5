"""`moco-tf export`: an encoder as a SavedModel, a Keras file, weights or TFLite, to be used without this package."""

import contextlib
import json
import math
import os
import re
import shutil
import tempfile

import numpy as np
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.callbacks import read_lines
from moco_tf.data.decode import decode_image
from moco_tf.errors import MocoError, UsageError
from moco_tf.evaluation.encoders import METADATA, open_encoder
from moco_tf.files import write_file
from moco_tf.heads import parts
from moco_tf.losses import at_least_float32
from moco_tf.normalization import BatchNorm
from moco_tf.train import build_encoder, open_data, set_precision, versions, view_recipe
from moco_tf.views import colour
from moco_tf.views.recipes import RECIPES, numbers_of

keras = tf.keras

PRECISIONS = ("float32", "bfloat16")
COMPARED_IMAGES = 4
DECODED_CHANNELS = 3    # of what an image file gives
OF_ONE_SIZE = ("tokens", "flatten")    # layers of a transformer and of an AlexNet


def export(path, out="", side="query", precision="float32", size=0, formats=("saved_model",), overwrite=False):
    """Writes an encoder into a folder, whole or not at all, and prints what it wrote.

    All but the SavedModel hold the backbone alone. The Keras file and the weights take normalised images, of CMC in its
    colour space; the SavedModel and the TFLite file take RGB in [0, 1], which they normalise and bring into that space.
    There they need not be whole levels, and are not rounded to such.

    Args:
        path: of the encoder: a run's workdir, or a file of weights, as `open_encoder` takes it.
        out: the folder, local or gs://; "": the folder export in the workdir.
        side: "query", or "key" for the momentum encoder.
        precision: of the computation, "float32" or "bfloat16"; weights, inputs and outputs are float32 in both.
        size: side of the images in pixels; 0: the one the encoder was made for.
        formats: keys of FORMATS.
        overwrite: replace an export that lies there.

    Returns:
        What the metadata file says.

    Raises:
        UsageError, DataError: arguments that do not go together, no encoder at the path, a folder that cannot be
        written or holds something; the folder is then as it was.
    """
    _check(formats, precision)
    if not out and not tf.io.gfile.exists(f"{path}/config.json"):
        raise UsageError(f"The encoder must be a run's workdir, or, with --out, a file of weights. Received: {path}.")
    out = (out or f"{path}/export").rstrip("/")
    _check_folder(out, overwrite)
    encoder = open_encoder(path, side, size)
    if encoder.config is None:
        raise UsageError(f"An export starts from a run's workdir or a file of weights. Received: {path}, a SavedModel.")
    model, preprocessing = plain_encoder(encoder, precision), _preprocessing(encoder)
    shape = (COMPARED_IMAGES, encoder.size, encoder.size, encoder.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = tf.function(encoder.rows)(images).numpy()
    facts = _facts(encoder, side, precision, model, preprocessing)
    with _written_whole(out) as folder:
        for name in formats:
            print(f"writing {name} ...", flush=True)
            before, (write, what) = _bytes(folder), FORMATS[name]
            features = write(folder, model, preprocessing)(images / np.float32(255.0))
            facts["formats"][name] = {"holds": what, "bytes": _bytes(folder) - before,
                                      "largest_difference": float(np.abs(features - expected).max()),
                                      "largest_feature": float(np.abs(expected).max())}
        write_file(f"{folder}/{METADATA}", json.dumps(facts, indent=2) + "\n")
    print(_summary(out, facts))
    return facts


def _check(formats, precision):
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"The formats must be one or more of {', '.join(FORMATS)}. "
                         f"Received: {', '.join(unknown) or 'none'}.")
    if precision not in PRECISIONS:
        raise UsageError(f"The precision must be one of {', '.join(PRECISIONS)}. Received: {precision!r}.")
    if "tflite" in formats and precision != "float32":
        raise UsageError("A TFLite file has float16 weights and computes in float32. Received: format tflite with "
                         f"precision {precision}. Export it by itself, with float32.")


# ---------------------------------------------------------------------------------------------- the model

def plain_encoder(encoder, precision="float32"):
    """A twin of an encoder that has Keras's own BatchNormalization, the whole batch one group, and the same weights.

    What the query encoder of the run learns is trainable, in the twin of a momentum encoder too. A transformer's blocks
    drop no branches.

    Args:
        encoder: an `Encoder` with a config.
        precision: of PRECISIONS.

    Returns:
        A functional model, normalised images (B, S, S, channels) -> embeddings (B, C), or features (B, D) where the
        encoder has no head. Its layers have the names of the original ones. A ResNet's takes images of any size and
        shape.
    """
    config = configs.override(encoder.config, **{"views.size": encoder.size})
    try:
        set_precision(precision)
        built = build_encoder(config)
        model = built if "embedding" in encoder.models else parts(built)["backbone"]
        fixed = any(layer.name.endswith(OF_ONE_SIZE) for layer in model.layers)
        sides = model.input_shape[1:3] if fixed else (None, None)
        twin = keras.models.clone_model(model, keras.Input((*sides, encoder.channels), name="images"), _plain_layer)
    finally:
        set_precision(encoder.config.precision)
    for layer in twin.layers:
        if layer.weights:    # what only casts is not in both
            layer.set_weights(_whole(encoder).get_layer(layer.name).get_weights())
    return twin


def _whole(encoder):
    return encoder.models.get("embedding", encoder.models["backbone"])


def _plain_layer(layer):
    if isinstance(layer, BatchNorm):
        return keras.layers.BatchNormalization(momentum=layer.momentum, epsilon=layer.epsilon, center=layer.center,
                                               scale=layer.scale, dtype=layer.dtype_policy, name=layer.name)
    # Of a transformer's block, what belongs to a run and not to the network, and brings state and gradients of its own.
    options = {name: value for name, value in (("drop_path", 0.0), ("rematerialise", False)) if hasattr(layer, name)}
    return type(layer).from_config({**layer.get_config(), **options})


def _is_transformer(model):
    return any(layer.name == "tokens" for layer in model.layers)


def _outputs(model):
    """{signature: {output: tensor}} of an encoder model: "features"; with a head "embedding"; "pyramid" or "tokens";
    and by a branch's name, where there are such, its own features. All others join the branches' channels."""
    features = model.get_layer("features").output
    outputs = {"features": {"features": features}}
    if model.output is not features:
        outputs["embedding"] = {"embedding": model.output}
    if _is_transformer(model):
        tokens = model.get_layer("norm").output
        patches, side = tokens[:, 1:], math.isqrt(tokens.shape[1] - 1)
        outputs["tokens"] = {"class_token": tokens[:, 0], "mean_of_patches": tf.reduce_mean(patches, axis=1),
                             "patches": tf.reshape(patches, (-1, side, side, tokens.shape[2]))}
    branches = [layer.name[:-len("features")] for layer in model.layers if layer.name.endswith(".features")]
    outputs.update({name[:-1]: {"features": model.get_layer(f"{name}features").output} for name in branches})
    stages = [_stages(model, name) for name in branches or [""]]
    if stages[0]:
        outputs["pyramid"] = {level: tf.concat([of_one[level] for of_one in stages], axis=-1) for level in stages[0]}
    return outputs


def _stages(model, branch):
    """{"C2": the last ReLU of a ResNet's first stage, ... "C5"}; empty of others. Later blocks replace earlier ones."""
    return {f"C{int(layer.name[len(branch) + 5]) + 1}": layer.output for layer in model.layers
            if re.fullmatch(rf"{re.escape(branch)}layer[1-4]\.\d+\.relu", layer.name)}


# ---------------------------------------------------------------------------------------------- preprocessing

def _preprocessing(encoder):
    recipe, size = view_recipe(encoder.config), encoder.size
    scale = _evaluation(size).views["image"].crop.frame(tf.constant([size, size]), tf.zeros([1])).scale
    mean, std = colour.SPACES[recipe.space][1:] if recipe.space else (recipe.mean, recipe.std)
    return {"input": f"{'RGB' if encoder.channels == 3 else f'{encoder.channels} channels'} in [0, 1]", "size": size,
            "shorter_side": round(size / float(scale[0])),
            "whole_up_to": size if _images_are_small(encoder.config, size) else 0,
            "interpolation": "bilinear, antialiased", "space": recipe.space, "mean": list(mean),
            "std": list(std)}


def _evaluation(size, **options):
    return RECIPES["eval"](size, xla=False, **options)


def _images_are_small(config, size):
    """Whether all images of a run's data are of one shape, no larger than `size`: evaluation takes such as a whole."""
    if config.data.name == "folder":    # of no shape in particular, and slow to list
        return False
    try:
        shape = open_data(configs.override(config, **{"data.download": False}))[0].image_shape
    except MocoError:    # the data are gone, or on another machine
        return False
    return bool(shape) and max(shape[:2]) <= size


def _read_images(encoded, size, whole_up_to):
    """(B,) strings, contents of image files -> (B, size, size, 3) float32 in [0, 1], as evaluation sees them."""
    resized, whole = _evaluation(size), _evaluation(size, shorter_side=size)
    numbers = {numbers_of("image"): tf.zeros([1])}      # of a crop that is always the same

    def read(content):
        image = decode_image(content)
        small = tf.reduce_max(tf.shape(image)) <= whole_up_to
        columns = tf.cond(small, lambda: whole.crop(image, numbers), lambda: resized.crop(image, numbers))["image"]
        return tf.transpose(columns, [2, 0, 1])

    images = tf.map_fn(read, encoded, fn_output_signature=tf.TensorSpec([size, size, 3], tf.uint8))
    return tf.cast(images, tf.float32) / 255.0


def _normalized(images, preprocessing):
    if preprocessing["space"]:    # mean and std are the space's, in its units
        return colour.normalized(255.0 * images, preprocessing["space"], axis=-1)
    return (images - tf.constant(preprocessing["mean"])) / tf.constant(preprocessing["std"])


# ---------------------------------------------------------------------------------------------- the formats

class SavedEncoder(tf.train.Checkpoint):
    """What `tf.saved_model.load` gives back: a callable images (B, S, S, 3), float32 in [0, 1] -> features (B, D).

    With `training=True` BatchNorm normalises by the batch and moves its moving statistics. `variables`,
    `trainable_variables` and `regularization_losses` are what TensorFlow Hub's layer asks for; the first two are those
    that features depend on, and the head's are `head_variables`. The numbers of the preprocessing are attributes too.

    Args:
        model: of `plain_encoder`.
        preprocessing: of `_preprocessing`.
    """

    def __init__(self, model, preprocessing):
        super().__init__()
        backbone = parts(model)["backbone"]
        self.variables = list(backbone.variables)
        self.trainable_variables = list(backbone.trainable_variables)
        own = {variable.ref() for variable in self.variables}
        self.head_variables = [variable for variable in model.variables if variable.ref() not in own]
        self.regularization_losses = []
        for name in ("size", "shorter_side", "whole_up_to", "mean", "std"):
            setattr(self, name, tf.Variable(preprocessing[name], trainable=False, name=name))
        # Keras models as attributes would be saved once more, layer by layer.
        tensors = _outputs(model)
        embedding = tensors.pop("embedding", {}).get("embedding")
        network = keras.Model(model.input, tensors)

        # One graph for all that a backbone gives, of which each signature keeps what it needs: tracing takes the time.
        @tf.function(autograph=False)
        def outputs(images, training):
            found = network(_normalized(images, preprocessing), training=training)
            return tf.nest.map_structure(at_least_float32, found)

        self.outputs = outputs
        if embedding is not None:
            head = keras.Model(tensors["features"]["features"], embedding)
            self.head = tf.function(lambda features: at_least_float32(head(features, training=False)), autograph=False)

    @tf.function(autograph=False)
    def __call__(self, images, training=False):
        return self.outputs(images, training)["features"]["features"]


def _write_saved_model(folder, model, preprocessing):
    saved = SavedEncoder(model, preprocessing)
    images = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")
    for training in (False, True):
        saved.__call__.get_concrete_function(images, training=training)

    def signature(name):
        return tf.function(lambda images: saved.outputs(images, False)[name], [images], autograph=False)

    @tf.function(input_signature=[images], autograph=False)
    def embedding(images):
        return {"embedding": saved.head(saved(images))}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")], autograph=False)
    def serving_bytes(image_bytes):
        return {"features": saved(_read_images(image_bytes, preprocessing["size"], preprocessing["whole_up_to"]))}

    signatures = {name: embedding if name == "embedding" else signature(name) for name in _outputs(model)}
    if images.shape[-1] == DECODED_CHANNELS:
        signatures["serving_bytes"] = serving_bytes
    tf.saved_model.save(saved, folder, signatures)
    return lambda images: tf.saved_model.load(folder)(images).numpy()


def _write_keras(folder, model, preprocessing):
    path = f"{folder}/backbone.keras"
    parts(model)["backbone"].save(path)
    return lambda images: _features(keras.models.load_model(path, compile=False), images, preprocessing)


def _write_weights(folder, model, preprocessing):
    path, backbone = f"{folder}/backbone.weights.h5", parts(model)["backbone"]
    backbone.save_weights(path)

    def features(images):
        backbone.load_weights(path)
        return _features(backbone, images, preprocessing)

    return features


def _write_tflite(folder, model, preprocessing):
    path, backbone, size = f"{folder}/features.tflite", parts(model)["backbone"], preprocessing["size"]
    module = tf.Module()
    module.weights = backbone.variables
    module.features = tf.function(
        lambda images: {"features": backbone(_normalized(images, preprocessing), training=False)},
        [tf.TensorSpec([None, size, size, backbone.input_shape[-1]], name="images")], autograph=False)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.features.get_concrete_function()], module)
    converter.optimizations, converter.target_spec.supported_types = [tf.lite.Optimize.DEFAULT], [tf.float16]
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(converter.convert())

    def features(images):
        interpreter = tf.lite.Interpreter(path)
        interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return features


def _features(backbone, images, preprocessing):
    return at_least_float32(backbone(_normalized(images, preprocessing), training=False)).numpy()


# {name: (function, what it holds)}; a function (folder, model, preprocessing) writes, and returns a function
# images in [0, 1] -> features that reads what was written.
FORMATS = {
    "saved_model": (_write_saved_model, "the folder itself, for tf.saved_model.load: images in [0, 1]"),
    "keras": (_write_keras, "backbone.keras, for load_model of Keras 2, with moco_tf imported for a transformer's: "
                            "normalised images, (image - mean) / std in the colour space, to features"),
    "weights": (_write_weights, "backbone.weights.h5, for load_weights of the same backbone"),
    "tflite": (_write_tflite, "features.tflite, weights in float16: images in [0, 1] of the size to features"),
}


# ---------------------------------------------------------------------------------------------- the folder

def _check_folder(folder, overwrite):
    if not tf.io.gfile.exists(folder):
        return
    if not tf.io.gfile.isdir(folder) or tf.io.gfile.listdir(folder) and not tf.io.gfile.exists(f"{folder}/{METADATA}"):
        raise UsageError(f"--out must be a new or empty folder, or that of an export. Received: {folder}, which holds "
                         "something else. Name another.")
    if tf.io.gfile.listdir(folder) and not overwrite:
        raise UsageError(f"--out must be a new folder. Received: {folder}, which holds an export. Name another, or add "
                         "--overwrite.")


@contextlib.contextmanager
def _written_whole(folder):
    """A local folder to write into, which takes the place of `folder` when all is written."""
    remote = "://" in folder
    staging = tempfile.mkdtemp() if remote else f"{folder}.partial"
    try:
        if not remote and os.path.exists(staging):    # of an export that was killed
            shutil.rmtree(staging)
        tf.io.gfile.makedirs(folder if remote else staging)
        yield staging
        if remote:
            _upload(staging, folder)
        else:
            _replace(staging, folder)
    except (tf.errors.OpError, OSError) as error:
        raise UsageError(f"--out must be a folder that can be written. Received: {folder}: "
                         f"{str(getattr(error, 'message', error)).splitlines()[0]}.") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(staging, folder):
    before = f"{folder}.before"
    shutil.rmtree(before, ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, before)
    os.rename(staging, folder)
    shutil.rmtree(before, ignore_errors=True)


def _upload(staging, folder):
    """For object stores, which rename no folders: a SavedModel is one by saved_model.pb, so that comes last."""
    marker = "saved_model.pb"
    if tf.io.gfile.exists(f"{folder}/{marker}"):
        tf.io.gfile.remove(f"{folder}/{marker}")
    tf.io.gfile.rmtree(folder)
    names = [os.path.relpath(path, staging) for path in _paths(staging)]
    for name in sorted(names, key=lambda name: (name == marker, name != METADATA)):
        tf.io.gfile.makedirs(os.path.dirname(f"{folder}/{name}"))
        tf.io.gfile.copy(f"{staging}/{name}", f"{folder}/{name}")


def _paths(folder):
    return [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]


def _bytes(folder):
    return sum(map(os.path.getsize, _paths(folder)))


# ---------------------------------------------------------------------------------------------- what is said of it

def _facts(encoder, side, precision, model, preprocessing):
    trainable = sum(weight.shape.num_elements() for weight in model.trainable_weights)
    outputs = _outputs(_whole(encoder))    # of static shape
    if encoder.channels == DECODED_CHANNELS:
        outputs["serving_bytes"] = outputs["features"]
    shapes = tf.nest.map_structure(lambda tensor: [None, *tensor.shape[1:]], outputs)
    widths = {name: outputs[name][name].shape[-1] for name in ("features", "embedding") if name in outputs}
    return {
        "encoder": encoder.description, "path": encoder.path, "side": side, "step": encoder.step,
        "precision": precision, "preprocessing": preprocessing, "signatures": shapes, "widths": widths,
        "parameters": {"trainable": trainable, "other": model.count_params() - trainable},
        "formats": {}, "fingerprint": encoder.fingerprint(), "metrics": _metrics(encoder.path),
        "versions": versions(), "config_hash": configs.digest(encoder.config),
        "config": json.loads(configs.to_json(encoder.config))}


def _metrics(path):
    """The results and the last measurements of a run, where it has such."""
    metrics, results = {}, f"{path}/results.json"
    if tf.io.gfile.exists(results):
        with tf.io.gfile.GFile(results) as file:
            metrics["results"] = json.load(file)
    measured = read_lines(f"{path}/monitor.jsonl")
    return {**metrics, "monitor": measured[-1]} if measured else metrics


def _summary(out, facts):
    lines = [f"{out}: {facts['encoder']}, {facts['precision']}, "
             f"{facts['parameters']['trainable']:,} trainable parameters"]
    for name, written in facts["formats"].items():
        lines.append(f"  {name:12s}{written['bytes'] / 1e6:8.1f} MB  features differ from the training model's by at "
                     f"most {written['largest_difference']:.1e} (the largest is {written['largest_feature']:.3g})")
    if "saved_model" in facts["formats"]:
        for name, outputs in facts["signatures"].items():
            given = ", ".join(f"{output} (B, {', '.join(map(str, shape[1:]))})" for output, shape in outputs.items())
            lines.append(f"  signature {name}: {given}")
    return "\n".join(lines)
