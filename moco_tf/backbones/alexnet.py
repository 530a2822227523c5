"""Half an AlexNet, CMC's backbone for one view (arXiv:1906.05849, and its code), in that code's names.

BatchNorm and ReLU follow every layer, there is no dropout and no local response normalisation, and `fc6.0` here is
`l_to_ab.fc6.0.weight` or `ab_to_l.fc6.0.weight` there. A linear head `fc` on the features is the code's `fc8.0`.
"""

import functools

import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.normalization import BatchNorm

keras = tf.keras

# Of each convolution: channels, kernel, stride, padding of both sides, whether a max-pool follows.
BLOCKS = ((48, 11, 4, 2, True), (128, 5, 1, 2, True), (192, 3, 1, 1, False), (192, 3, 1, 1, False),
          (128, 3, 1, 1, True))
UNITS = 2048
SMALLEST = 63    # pixels a side; below it nothing is left for the last max-pool

# The numbers that probes know the layers by. The next number, 8, is the head's.
NUMBERED_LAYERS = {1: "conv_block_1.3", 2: "conv_block_2.3", 3: "conv_block_3.2", 4: "conv_block_4.2",
                   5: "conv_block_5.3", 6: "fc6.2", 7: "features"}


def alexnet(bn_group_size=None, size=224, channels=3):
    """Half an AlexNet without its last linear layer.

    Args:
        bn_group_size: images that share BatchNorm statistics; None: the batch of a replica.
        size: side of the images in pixels, 63 at least; the first linear layer, fc6, is built for it.
        channels: of the images; 1 and 2 for luminance and chroma in CMC.

    Returns:
        A functional model from (B, size, size, channels) images to (B, 2048) features. Outputs have the compute dtype
        of the Keras policy.

    Raises:
        UsageError: images that are too small, or of unknown size.
    """
    if not size or size < SMALLEST:
        raise UsageError(f"An AlexNet's images must have at least {SMALLEST} pixels a side, a number that is known. "
                         f"Received: size {size}.")
    norm = functools.partial(BatchNorm, bn_group_size)
    images = keras.Input((size, size, channels), name="images")
    x = images
    for block, (filters, kernel, stride, padding, pool) in enumerate(BLOCKS, 1):
        name = f"conv_block_{block}"
        x = keras.layers.ZeroPadding2D(padding, name=f"{name}.pad")(x)
        bound = (kernel * kernel * x.shape[-1]) ** -0.5
        x = keras.layers.Conv2D(filters, kernel, stride, use_bias=False, kernel_initializer=_uniform(bound),
                                name=f"{name}.0")(x)
        x = norm(name=f"{name}.1")(x)
        x = keras.layers.ReLU(name=f"{name}.2")(x)
        if pool:
            x = keras.layers.MaxPool2D(3, 2, name=f"{name}.3")(x)
    # PyTorch flattens channels first, and so orders the inputs of fc6.
    x = keras.layers.Flatten(name="flatten")(keras.layers.Permute((3, 1, 2), name="channels_first")(x))
    for name, activation in (("fc6", "fc6.2"), ("fc7", "features")):
        bound = x.shape[-1] ** -0.5
        x = keras.layers.Dense(UNITS, kernel_initializer=_uniform(bound), bias_initializer=_uniform(bound),
                               name=f"{name}.0")(x)
        x = keras.layers.ReLU(name=activation)(norm(name=f"{name}.1")(x))
    return keras.Model(images, x, name="alexnet")


def _uniform(bound):
    """PyTorch's default for convolutions and linear layers, within 1 / sqrt(fan_in)."""
    return keras.initializers.RandomUniform(-bound, bound)
