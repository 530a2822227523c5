"""Features of an encoder's numbered layers, by which CMC's code probes its depth (arXiv:1906.05849)."""

import dataclasses
import math

import tensorflow as tf

from moco_tf.backbones.alexnet import NUMBERED_LAYERS as ALEXNET_LAYERS
from moco_tf.backbones.resnet import numbered_layers as resnet_layers
from moco_tf.errors import UsageError
from moco_tf.evaluation.pooling import adaptive_pool
from moco_tf.losses import at_least_float32

keras = tf.keras


def numbered_layers(encoder):
    """{number: tensor of the backbone, (B, h, w, C) or (B, D)}; of several branches the channels stand side by side.

    The last one is of the pooled features; what the head gives has no number here.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.

    Raises:
        UsageError: its layers have no numbers: it is no ResNet and no AlexNet, or a SavedModel.
    """
    config, model = encoder.config, encoder.models["backbone"]
    if config is None or config.backbone.name not in ("resnet", "alexnet"):
        raise UsageError("Numbered layers are those of a ResNet or an AlexNet, from a run or a file of weights. "
                         f"Received: {encoder.path}, {f'a {config.backbone.name}' if config else 'a SavedModel'}. "
                         "Probe its features by --config=linear_v1v2.")
    names = ALEXNET_LAYERS if config.backbone.name == "alexnet" else resnet_layers(
        config.backbone.get("depth", 50), config.backbone.get("stem", "imagenet"))
    prefixes = [f"{name}." for name, _ in config.branches] or [""]
    layers = {}
    for number, name in names.items():
        tensors = [model.get_layer(prefix + name).output for prefix in prefixes]
        layers[number] = tensors[0] if len(tensors) == 1 else tf.concat(tensors, axis=-1)
    return layers


def at_layer(encoder, number, reduce="avg", cells=()):
    """The Encoder whose features are those of a numbered layer: maps are pooled to a grid and flattened.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        number: of the layer.
        reduce: how maps are pooled, see `adaptive_pool`.
        cells: of a side, to which the maps of layer 1, of layer 2 and so on are pooled; those of later layers are not.

    Returns:
        An Encoder without an embedding; its features (B, D) are flattened channels first, as PyTorch has them.

    Raises:
        UsageError: no such layer, see `numbered_layers`.
    """
    layers = numbered_layers(encoder)
    if number not in layers:
        known = ", ".join(f"{n} {tuple(layer.shape[1:])}" for n, layer in layers.items())
        raise UsageError(f"The layer to probe must be one of these, here with their shapes: {known}. Received: layer "
                         f"{number} of {encoder.path}.")
    features = at_least_float32(layers[number])
    if features.shape.rank == 4:
        if number <= len(cells):
            features = adaptive_pool(features, cells[number - 1], reduce)
        features = tf.reshape(tf.transpose(features, [0, 3, 1, 2]), [-1, math.prod(features.shape[1:])])
    model = keras.Model(encoder.models["backbone"].input, features, name=f"layer{number}")
    return dataclasses.replace(encoder, models={"backbone": model},
                               description=f"{encoder.description}, layer {number}")
