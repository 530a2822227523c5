"""Vision transformers (arXiv:2010.11929) as MoCo v3 trains them (arXiv:2104.02057), in timm's form and names.

Fixed two-dimensional sine-cosine positions, class token, pre-norm blocks; patches come from one convolution or from a
stem of five. Every layer carries the name of timm's module, so `blocks.0.attn.qkv` here is `blocks.0.attn.qkv.weight`
there.
"""

import functools
import math
import random

import numpy as np
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.normalization import BatchNorm

keras = tf.keras

STEMS = ("patch", "conv")
CONV_STRIDES = 4           # of the convolutional stem, 2 each, so that its patches have 16 pixels
LAYER_NORM_EPSILON = 1e-6


def vit(dim, depth, heads, patch=16, mlp_ratio=4, stem="patch", freeze_patch=False, trainable_positions=False,
        drop_path=0.0, rematerialise=False, bn_group_size=None, size=224, channels=3):
    """A vision transformer without its classifier.

    Args:
        dim: D, the length of a token.
        depth: number of blocks.
        heads: of the attention; they divide `dim` among them.
        patch: side of a patch in pixels.
        mlp_ratio: width of a block's hidden layer over `dim`.
        stem: "patch": one convolution, the size and stride of a patch; "conv": four 3x3 convolutions of stride 2 with
            BatchNorm and a 1x1 convolution, for patches of 16 pixels.
        freeze_patch: keep the patch convolution as it starts, at random, which makes training stable (MoCo v3, sec. 4);
            the convolutional stem does not need it and is never frozen.
        trainable_positions: let the position embedding learn, as fine-tuning does (DeiT).
        drop_path: probability of leaving out a branch of the last block, growing linearly from 0 in the first
            (stochastic depth, arXiv:1603.09382); for every image by itself, in training only.
        rematerialise: keep no activation inside the blocks, but compute them again for the gradient.
        bn_group_size: images that share BatchNorm statistics in the convolutional stem, as `BatchNorm` takes it.
        size: side of the images in pixels, a multiple of `patch`.
        channels: of the images.

    Returns:
        A functional model from (B, size, size, channels) images to (B, D) features, the class token behind the last
        LayerNorm, in layer "features"; all tokens, class token first, (B, 1 + patches, D), are the output of layer
        "norm". Outputs have the compute dtype of the Keras policy.

    Raises:
        UsageError: an unknown stem; numbers that do not divide as they must.
    """
    _check(dim, depth, heads, patch, stem, size)
    images = keras.Input((size, size, channels), name="images")
    if stem == "conv":
        x = _conv_stem(images, dim, functools.partial(BatchNorm, bn_group_size))
    else:
        # Xavier's bound for the patch as a vector; Keras would count the outputs once for every pixel.
        bound = (6.0 / (channels * patch * patch + dim)) ** 0.5
        x = keras.layers.Conv2D(dim, patch, patch, kernel_initializer=_uniform(bound), trainable=not freeze_patch,
                                name="patch_embed.proj")(images)
    x = keras.layers.Reshape(((size // patch) ** 2, dim), name="patch_embed.flatten")(x)
    x = Tokens(trainable_positions, name="tokens")(x)
    for block in range(depth):
        rate = drop_path * block / max(depth - 1, 1)
        x = Block(heads, mlp_ratio, rate, rematerialise, name=f"blocks.{block}")(x)
    x = keras.layers.LayerNormalization(epsilon=LAYER_NORM_EPSILON, name="norm")(x)
    return keras.Model(images, ClassToken(name="features")(x), name="vit")


vit_small = functools.partial(vit, dim=384, depth=12, heads=12)    # 12 heads; DeiT-S has 6
vit_base = functools.partial(vit, dim=768, depth=12, heads=12)
vit_conv_small = functools.partial(vit, dim=384, depth=11, heads=12, stem="conv")
vit_conv_base = functools.partial(vit, dim=768, depth=11, heads=12, stem="conv")


def _check(dim, depth, heads, patch, stem, size):
    if stem not in STEMS:
        raise UsageError(f"A vision transformer's stem must be one of {', '.join(STEMS)}. Received: stem {stem!r}.")
    if min(dim, depth, heads, patch) < 1:
        raise UsageError("dim, depth, heads and patch must be at least 1. "
                         f"Received: {dim}, {depth}, {heads} and {patch}.")
    if stem == "conv" and patch != 2 ** CONV_STRIDES:
        raise UsageError(f"The convolutional stem makes patches of {2 ** CONV_STRIDES} pixels. "
                         f"Received: patch {patch}.")
    divisor = math.lcm(heads, 2 ** (CONV_STRIDES - 1) if stem == "conv" else 4)
    if dim % divisor:
        raise UsageError("dim must be a multiple of the number of heads, of 4 for the positions, and of 8 with the "
                         f"convolutional stem. Received: dim {dim}, heads {heads}. Nearest: {_nearest(dim, divisor)}.")
    if not size or size % patch:
        nearest = f" Nearest: {_nearest(size, patch)}." if size else ""
        raise UsageError(f"The images' side must be a multiple of the patch, {patch} pixels. "
                         f"Received: size {size}.{nearest}")


def _nearest(value, divisor):
    """The multiples of `divisor` on both sides of `value`, in words."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def _conv_stem(images, dim, norm):
    x = images
    for position in range(CONV_STRIDES):
        name, filters = f"patch_embed.proj.{3 * position}", dim >> (CONV_STRIDES - 1 - position)
        x = keras.layers.ZeroPadding2D(1, name=f"{name}.pad")(x)    # both sides alike, as in PyTorch
        x = keras.layers.Conv2D(filters, 3, 2, use_bias=False, name=name,
                                kernel_initializer=_uniform((9 * x.shape[-1]) ** -0.5))(x)
        x = norm(name=f"patch_embed.proj.{3 * position + 1}")(x)
        x = keras.layers.ReLU(name=f"patch_embed.proj.{3 * position + 2}")(x)
    bound = dim ** -0.5
    return keras.layers.Conv2D(dim, 1, kernel_initializer=_uniform(bound), bias_initializer=_uniform(bound),
                               name=f"patch_embed.proj.{3 * CONV_STRIDES}")(x)


def _uniform(bound):
    return keras.initializers.RandomUniform(-bound, bound)


def position_table(side, dim):
    """Sines and cosines of the rows and columns of a square grid of patches (MoCo v3's code; sec. 4, "fixed").

    Returns:
        (1 + side * side, dim) float32: zeros for the class token; then, row by row, a patch's
        [sin(row w), cos(row w), sin(column w), cos(column w)] with dim / 4 frequencies w from 1 down to almost 1e-4.
    """
    frequencies = (1.0 / 10000.0 ** (np.arange(dim // 4) / (dim // 4))).astype(np.float32)
    angles = np.arange(side, dtype=np.float32)[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)    # (side, dim / 2)
    grid = np.concatenate([np.repeat(waves, side, axis=0), np.tile(waves, (side, 1))], axis=1)
    return np.concatenate([np.zeros((1, dim), np.float32), grid])


@keras.utils.register_keras_serializable("moco_tf")
class Tokens(keras.layers.Layer):
    """(B, P, D) patches of a square grid, row by row -> (B, 1 + P, D): the class token first, positions added.

    The position embedding is a weight, so that it is saved and exchanged with the others.
    """

    def __init__(self, trainable_positions=False, **kwargs):
        super().__init__(**kwargs)
        self.trainable_positions = trainable_positions

    def build(self, input_shape):
        _, patches, dim = input_shape
        table = position_table(math.isqrt(patches), dim)
        self.cls_token = self.add_weight(
            "cls_token", shape=(1, 1, dim), initializer=keras.initializers.RandomNormal(stddev=1e-6))
        self.pos_embed = self.add_weight(
            "pos_embed", shape=(1, 1 + patches, dim), trainable=self.trainable_positions,
            initializer=lambda shape, dtype: tf.reshape(tf.cast(table, dtype), shape))
        super().build(input_shape)

    def call(self, patches):
        first = tf.zeros_like(patches[:, :1]) + self.cls_token    # once for every image
        return tf.concat([first, patches], axis=1) + self.pos_embed

    def get_config(self):
        return dict(super().get_config(), trainable_positions=self.trainable_positions)


@keras.utils.register_keras_serializable("moco_tf")
class ClassToken(keras.layers.Layer):
    """(B, T, D) tokens -> (B, D), the first of them."""

    def call(self, tokens):
        return tokens[:, 0]


@keras.utils.register_keras_serializable("moco_tf")
class Block(keras.layers.Layer):
    """A pre-norm transformer block on (B, T, D) tokens: x + attention(norm1(x)), then x + mlp(norm2(x)).

    Softmax and norms are at least float32, the rest has the compute dtype.

    Args:
        heads: of the attention, a divisor of D.
        mlp_ratio: width of the hidden layer over D.
        drop_path: probability with which training leaves out a branch of an image; what stays is divided by the
            probability of staying. (The layer of this name in TensorFlow Addons draws once for the whole batch, and
            scales at inference instead.)
        rematerialise: compute the activations again for the gradient instead of keeping them.
    """

    def __init__(self, heads, mlp_ratio=4, drop_path=0.0, rematerialise=False, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.mlp_ratio = heads, mlp_ratio
        self.drop_path, self.rematerialise = drop_path, rematerialise
        if drop_path:    # a generator is saved with the run's checkpoints, and goes on from there
            self.generator = tf.random.Generator.from_seed(random.randrange(2 ** 63))

    def build(self, input_shape):
        dim = input_shape[-1]
        norm = functools.partial(keras.layers.LayerNormalization, epsilon=LAYER_NORM_EPSILON, dtype=self.dtype_policy)
        dense = functools.partial(keras.layers.Dense, dtype=self.dtype_policy)
        # Queries, keys and values are three D x D matrices side by side, and start as such.
        qkv = functools.partial(dense, kernel_initializer=_uniform((6.0 / (2 * dim)) ** 0.5))
        self.norm1 = norm(name=f"{self.name}.norm1")
        self.qkv = qkv(3 * dim, name=f"{self.name}.attn.qkv")
        self.proj = dense(dim, name=f"{self.name}.attn.proj")
        self.norm2 = norm(name=f"{self.name}.norm2")
        self.fc1 = dense(self.mlp_ratio * dim, name=f"{self.name}.mlp.fc1")
        self.fc2 = dense(dim, name=f"{self.name}.mlp.fc2")
        for layer in (self.norm1, self.qkv, self.proj, self.norm2, self.fc1, self.fc2):
            with tf.name_scope(layer.name):    # into the variables' names, as if it were called
                layer.build((None, None, self.mlp_ratio * dim if layer is self.fc2 else dim))
        super().build(input_shape)

    def call(self, tokens, training=None):
        kept = ()
        if training and self.drop_path:
            # Drawn out here: what is computed again for the gradient must not be drawn again.
            draws = self.generator.uniform((2, tf.shape(tokens)[0], 1, 1))
            kept = tf.unstack(tf.cast(draws >= self.drop_path, tokens.dtype) / (1.0 - self.drop_path))
        if training and self.rematerialise:
            return tf.recompute_grad(self._branches)(tokens, *kept)
        return self._branches(tokens, *kept)

    def _branches(self, x, keep_attention=1.0, keep_mlp=1.0):
        x = x + keep_attention * self.proj(self._attend(self.qkv(self.norm1(x))))
        return x + keep_mlp * self.fc2(_gelu(self.fc1(self.norm2(x))))

    def _attend(self, qkv):
        """(B, T, 3 D): queries, keys and values, head by head -> (B, T, D)."""
        tokens, dim = qkv.shape[1], qkv.shape[2] // 3
        qkv = tf.reshape(qkv, (-1, tokens, 3, self.heads, dim // self.heads))
        query, key, value = tf.unstack(tf.transpose(qkv, (2, 0, 3, 1, 4)))    # (B, heads, T, D / heads) each
        scores = tf.matmul(query * (dim // self.heads) ** -0.5, key, transpose_b=True)
        wide = tf.float32 if scores.dtype.size < 4 else scores.dtype
        weights = tf.cast(tf.nn.softmax(tf.cast(scores, wide)), value.dtype)
        return tf.reshape(tf.transpose(tf.matmul(weights, value), (0, 2, 1, 3)), (-1, tokens, dim))

    def get_config(self):
        return dict(super().get_config(), heads=self.heads, mlp_ratio=self.mlp_ratio, drop_path=self.drop_path,
                    rematerialise=self.rematerialise)


def _gelu(x):
    # tf.nn.gelu rounds the square root of 2 to float32 whatever the dtype, which float64 shows.
    return 0.5 * x * (1.0 + tf.math.erf(x * 0.5 ** 0.5))
