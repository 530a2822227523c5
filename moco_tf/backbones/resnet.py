"""Residual networks (arXiv:1512.03385) in torchvision's form, for exchange of weights with it.

The stride sits in the 3x3 convolution, padding is symmetric, convolutions have no bias, and every layer carries the
name of torchvision's module, so `layer1.0.conv1` here is `layer1.0.conv1.weight` there.
"""

import functools

import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.normalization import BatchNorm

keras = tf.keras

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
STEMS = ("imagenet", "cifar")


def resnet(depth=50, width=1, groups=1, width_per_group=64, stem="imagenet", zero_init_residual=False,
           bn_group_size=None, size=None, channels=3, stem_channels=None):
    """A residual network without its classifier.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: factor on every number of channels, features included, and stem (MoCo's R50w2x, w4x) unless
            `stem_channels` says otherwise (CMC's and InsDis's); may be fractional.
        groups, width_per_group: of the 3x3 convolution in bottlenecks: ResNeXt-50 32x4d is (32, 4), torchvision's
            wide_resnet50_2 is (1, 128). They multiply with `width`.
        stem: "imagenet": 7x7, stride 2, then max-pooling by 2; "cifar": 3x3, no pooling.
        zero_init_residual: start the last gamma of every block at 0, so that blocks start as identities (MoCo v3).
        bn_group_size: images that share BatchNorm statistics; None: the batch of a replica.
        size: side of the images in pixels; None: any.
        channels: of the images.
        stem_channels: outputs of the stem; None: width * 64. CMC's and InsDis's stems have 64 at every width.

    Returns:
        A functional model from (B, size, size, channels) images to (B, D) features; D is width * 512 for depths 18 and
        34, otherwise width * 2048. Outputs have the compute dtype of the Keras policy.

    Raises:
        UsageError: for a depth or stem that does not exist, or groups in a network without bottlenecks.
    """
    if depth not in BLOCKS:
        raise UsageError(f"A ResNet must have one of the depths {sorted(BLOCKS)}. Received: depth {depth}.")
    if stem not in STEMS:
        raise UsageError(f"A ResNet's stem must be one of {', '.join(STEMS)}. Received: stem {stem!r}.")
    if depth < 50 and (groups, width_per_group) != (1, 64):
        raise UsageError(
            "groups and width_per_group belong to bottlenecks, so to depths 50, 101 and 152. "
            f"Received: depth {depth}, groups {groups}, width_per_group {width_per_group}.")

    norm = functools.partial(BatchNorm, bn_group_size)
    last_norm = functools.partial(norm, gamma_initializer="zeros" if zero_init_residual else "ones")
    images = keras.Input((size, size, channels), name="images")
    x = _stem(images, stem_channels or round(64 * width), stem, norm)
    for stage, blocks in enumerate(BLOCKS[depth]):
        planes = round(64 * width * 2 ** stage)
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"layer{stage + 1}.{block}"
            if depth < 50:
                x = _basic_block(x, planes, stride, norm, last_norm, name)
            else:
                inner = int(planes * width_per_group / 64) * groups
                x = _bottleneck(x, planes, inner, groups, stride, norm, last_norm, name)
    features = keras.layers.GlobalAveragePooling2D(name="features")(x)
    return keras.Model(images, features, name=f"resnet{depth}")


def numbered_layers(depth=50, stem="imagenet"):
    """CMC's numbers of the layers for probes: {1: the stem's layer, 2 to 5: the stages', 6: "features"}.

    The next number, 7, is the head's.
    """
    stages = {2 + stage: f"layer{stage + 1}.{blocks - 1}.relu" for stage, blocks in enumerate(BLOCKS[depth])}
    return {1: "maxpool" if stem == "imagenet" else "relu", **stages, 6: "features"}


def _stem(images, filters, stem, norm):
    if stem == "cifar":
        # This convolution replaces the original one after the network's own initialisation, so it starts from
        # PyTorch's default for convolutions: uniform within 1 / sqrt(fan_in).
        bound = (9 * images.shape[-1]) ** -0.5
        x = _conv(images, filters, 3, "conv1", initializer=keras.initializers.RandomUniform(-bound, bound))
        return _relu(norm(name="bn1")(x), "relu")
    x = _conv(images, filters, 7, "conv1", stride=2)
    x = _relu(norm(name="bn1")(x), "relu")
    # Zeros are as good as minus infinity here: no input is negative.
    x = keras.layers.ZeroPadding2D(1, name="maxpool.pad")(x)
    return keras.layers.MaxPool2D(3, 2, name="maxpool")(x)


def _basic_block(x, planes, stride, norm, last_norm, name):
    y = _conv(x, planes, 3, f"{name}.conv1", stride)
    y = _relu(norm(name=f"{name}.bn1")(y), f"{name}.relu1")
    y = _conv(y, planes, 3, f"{name}.conv2")
    y = last_norm(name=f"{name}.bn2")(y)
    return _join(y, _shortcut(x, planes, stride, norm, name), name)


def _bottleneck(x, planes, inner, groups, stride, norm, last_norm, name):
    y = _conv(x, inner, 1, f"{name}.conv1")
    y = _relu(norm(name=f"{name}.bn1")(y), f"{name}.relu1")
    y = _conv(y, inner, 3, f"{name}.conv2", stride, groups)
    y = _relu(norm(name=f"{name}.bn2")(y), f"{name}.relu2")
    y = _conv(y, 4 * planes, 1, f"{name}.conv3")
    y = last_norm(name=f"{name}.bn3")(y)
    return _join(y, _shortcut(x, 4 * planes, stride, norm, name), name)


def _shortcut(x, filters, stride, norm, name):
    if stride == 1 and x.shape[-1] == filters:
        return x
    return norm(name=f"{name}.downsample.1")(_conv(x, filters, 1, f"{name}.downsample.0", stride))


def _join(y, shortcut, name):
    return _relu(keras.layers.Add(name=f"{name}.add")([y, shortcut]), f"{name}.relu")


def _relu(x, name):
    return keras.layers.ReLU(name=name)(x)


def _conv(x, filters, kernel, name, stride=1, groups=1, initializer=None):
    if stride > 1 and kernel > 1:    # PyTorch pads both sides alike; SAME would shift a strided kernel by a pixel
        x = keras.layers.ZeroPadding2D(kernel // 2, name=f"{name}.pad")(x)
    # He et al.'s N(0, 2 / fan_out), untruncated; Keras would count the fan differently where there are groups.
    he = keras.initializers.RandomNormal(stddev=(2.0 / (kernel * kernel * filters)) ** 0.5)
    return keras.layers.Conv2D(
        filters, kernel, stride, padding="same" if stride == 1 else "valid", groups=groups, use_bias=False,
        kernel_initializer=initializer or he, name=name)(x)
