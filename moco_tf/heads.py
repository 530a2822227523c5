"""Heads: features (B, D) to embeddings (B, C). Layers are named as in PyTorch's state dicts: `fc`, `fc.0`, `fc.2`."""

import tensorflow as tf

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


HEADS = {"linear": linear, "mlp": mlp}


def encoder(backbone, head):
    """The model images -> embeddings, flat, of the backbone's own layers. `head`: features tensor -> embedding."""
    return keras.Model(backbone.input, head(backbone.output), name="encoder")


def _dense(x, units, name):
    # PyTorch's default for a linear layer: weight and bias uniform within 1 / sqrt(inputs).
    bound = x.shape[-1] ** -0.5
    return keras.layers.Dense(
        units, name=name, kernel_initializer=keras.initializers.RandomUniform(-bound, bound),
        bias_initializer=keras.initializers.RandomUniform(-bound, bound))(x)


def _float32(x):
    # Loss and logits are float32 islands; float64 models stay float64.
    if tf.as_dtype(x.dtype).size >= 4:
        return x
    return keras.layers.Activation("linear", dtype="float32", name="embedding")(x)
