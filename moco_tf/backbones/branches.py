"""Several encoders as one: each sees its own channels of an image (CMC, arXiv:1906.05849, sec. 3)."""

import re

import tensorflow as tf

from moco_tf.errors import UsageError

keras = tf.keras


def branched_backbone(branches, build, size=None):
    """One backbone of several, side by side.

    Args:
        branches: ((name, channels), ...), in the order of the image's channels.
        build: channels -> a functional backbone, images (B, size, size, channels) -> features (B, D).
        size: side of the images in pixels; None: any.

    Returns:
        A flat functional model from (B, size, size, sum of the channels) images to (B, V * D) features, the layer
        "features": those of the V branches in their order. A branch's own layers carry its name, as `l_to_ab.conv1`.

    Raises:
        UsageError: branches without names, or of one name, or without channels.
    """
    good = [branch for branch in branches if _is_branch(branch)]
    if len(good) < 2 or len({name for name, _ in good}) < len(branches):
        raise UsageError('branches must be two or more pairs of a name (letters, digits, _) and a number of channels, no name twice, '
                         f'as (("l_to_ab", 1), ("ab_to_l", 2)). Received: {tuple(branches)!r}.')
    images = keras.Input((size, size, sum(count for _, count in branches)), name="images")
    features, first = [], 0
    for name, count in branches:
        features.append(under_name(name, build(count), images[:, :, :, first:first + count]))
        first += count
    return keras.Model(images, keras.layers.Concatenate(name="features")(features), name="branches")


def _is_branch(branch):
    return (isinstance(branch, (tuple, list)) and len(branch) == 2 and isinstance(branch[0], str)
            and re.fullmatch(r"[A-Za-z]\w*", branch[0]) and isinstance(branch[1], int) and branch[1] > 0)


def branched_head(branches, build, features):
    """The heads of the branches of a backbone, on their shares of its features.

    Args:
        branches: as of the backbone.
        build: features tensor (B, D) -> embedding tensor (B, C).
        features: (B, V * D), of `branched_backbone`.

    Returns:
        (B, V * C), at least float32.
    """
    width = features.shape[-1] // len(branches)
    embeddings = []
    for position, (name, _) in enumerate(branches):
        own = keras.Input((width,), dtype=features.dtype, name="own_features")
        share = features[:, position * width:(position + 1) * width]
        embeddings.append(under_name(name, keras.Model(own, build(own)), share))
    return keras.layers.Concatenate(name="embeddings", dtype=embeddings[0].dtype)(embeddings)


def under_name(name, model, inputs):
    """What a functional model makes of `inputs`; its layers, made anew, carry the name and a point before their own."""
    made = {id(model.input): inputs}
    for layer in model.layers[1:]:
        twin = layer.__class__.from_config({**layer.get_config(), "name": f"{name}.{layer.name}"})
        made[id(layer.output)] = twin(tf.nest.map_structure(lambda tensor: made[id(tensor)], layer.input))
    return made[id(model.output)]
