"""Heads: features (B, D) to embeddings (B, C). Layers are named as in PyTorch's state dicts: `fc`, `fc.0`, `fc.2`."""

import tensorflow as tf

from moco_tf.normalization import BatchNorm

keras = tf.keras


def linear(features, dim=128):
    """MoCo v1's head, one linear layer: (B, D) to (B, dim), at least float32."""
    return _float32(_dense(features, dim, "fc"))


def mlp(features, dim=128, hidden_dim=None):
    """MoCo v2's head (arXiv:2003.04297): linear layers with ReLU between, (B, D) to (B, dim), at least float32.

    Args:
        features: (B, D).
        dim: width of the embedding.
        hidden_dim: width of the hidden layer, or a tuple of widths, one a layer; None: D.
    """
    x = features
    widths = hidden_dim if isinstance(hidden_dim, tuple) else (hidden_dim or features.shape[-1],)
    for position, width in enumerate(widths):
        x = _dense(x, width, f"fc.{2 * position}")
        x = keras.layers.ReLU(name=f"fc.{2 * position + 1}")(x)
    return _float32(_dense(x, dim, f"fc.{2 * len(widths)}"))


def projector(features, layers=2, hidden_dim=4096, dim=256, bn_group_size=None):
    """MoCo v3's projector (arXiv:2104.02057, sec. 3): linear layers without bias, BatchNorm behind each, ReLU between.

    The last BatchNorm has neither gamma nor beta. A ResNet's projector has two layers, a vision transformer's three.

    Args:
        features: (B, D).
        layers: number of linear layers.
        hidden_dim: width of all but the last.
        dim: width of the embedding.
        bn_group_size: images that share BatchNorm statistics, as `BatchNorm` takes it.

    Returns:
        (B, dim), at least float32.
    """
    return _normalized_mlp(features, "fc", layers, hidden_dim, dim, True, bn_group_size)


HEADS = {"linear": linear, "mlp": mlp, "projector": projector}


def predictor(dim=256, layers=2, hidden_dim=4096, last_bn=False, bn_group_size=None):
    """MoCo v3's predictor (arXiv:2104.02057, sec. 3): a projector on embeddings, on the query side only.

    Args:
        dim: width of the embedding, and of what is predicted from it.
        layers, hidden_dim, bn_group_size: as for `projector`.
        last_bn: whether BatchNorm, without gamma and beta, follows the last layer too: with vision transformers.

    Returns:
        A functional model (B, dim) -> (B, dim), at least float32, its layers named `predictor.0` and so on.
    """
    projected = keras.Input((dim,), name="projected")
    prediction = _normalized_mlp(projected, "predictor", layers, hidden_dim, dim, last_bn, bn_group_size)
    return keras.Model(projected, prediction, name="predictor")


def encoder(backbone, head):
    """The model images -> embeddings, flat, of the backbone's own layers. `head`: features tensor -> embedding."""
    return keras.Model(backbone.input, head(backbone.output), name="encoder")


def parts(encoder):
    """{"backbone": images -> features, "embedding": the whole} of an encoder; they share its weights."""
    return {"backbone": keras.Model(encoder.input, encoder.get_layer("features").output, name="backbone"),
            "embedding": encoder}


def _normalized_mlp(x, name, layers, hidden_dim, dim, last_bn, bn_group_size):
    for layer in range(layers):
        last, position = layer == layers - 1, 3 * layer    # linear, BatchNorm and ReLU count, as in PyTorch
        x = _dense(x, dim if last else hidden_dim, f"{name}.{position}", use_bias=False)
        if not last or last_bn:
            x = BatchNorm(bn_group_size, center=not last, scale=not last, name=f"{name}.{position + 1}")(x)
        if not last:
            x = keras.layers.ReLU(name=f"{name}.{position + 2}")(x)
    return _float32(x)


def _dense(x, units, name, use_bias=True):
    # PyTorch's default for a linear layer: weight and bias uniform within 1 / sqrt(inputs).
    bound = x.shape[-1] ** -0.5
    return keras.layers.Dense(
        units, name=name, use_bias=use_bias, kernel_initializer=keras.initializers.RandomUniform(-bound, bound),
        bias_initializer=keras.initializers.RandomUniform(-bound, bound))(x)


def _float32(x):
    # Loss and logits are float32 islands; float64 models stay float64.
    if tf.as_dtype(x.dtype).size >= 4:
        return x
    return keras.layers.Activation("linear", dtype="float32", name="embedding")(x)
