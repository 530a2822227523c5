"""A split through an encoder, once."""

import numpy as np
import tensorflow as tf

from moco_tf.errors import DataError
from moco_tf.losses import at_least_float32, unit

keras = tf.keras


def features_and_embeddings(encoder):
    """A model (B, S, S, 3) -> (features (B, D) after global average pooling, embeddings (B, C)); shares the weights."""
    return keras.Model(encoder.input, [encoder.get_layer("features").output, encoder.output])


class Extractor:
    """Turns views into unit rows, in inference mode.

    Args:
        encoder: images -> embeddings, with the pooled features in the layer "features".
        normalize: uint8 images -> what the encoder takes.
    """

    def __init__(self, encoder, normalize):
        model = features_and_embeddings(encoder)

        @tf.function(reduce_retracing=True)
        def rows(images):
            features, embeddings = model(normalize(images), training=False)
            return unit(at_least_float32(features)), unit(embeddings)

        self.rows = rows

    def __call__(self, batches, progress=None):
        """Reads `evaluation_batches` to the end.

        Returns:
            ({view: (features (n, D), embeddings (n, C))}, labels (n,), index (n,)), NumPy, unit rows.
        """
        parts, labels, indexes = {}, [], []
        for views, label, index, real in batches:
            real = real.numpy()
            for name, images in views.items():
                parts.setdefault(name, []).append([part.numpy()[real] for part in self.rows(images)])
            labels.append(label.numpy()[real])
            indexes.append(index.numpy()[real])
            if progress:
                progress(int(real.sum()))
        if not sum(map(len, labels)):
            raise DataError("Some images to evaluate on must be readable. Received: none that is. "
                            "`moco-tf data check` lists them.")
        joined = {name: tuple(np.concatenate(column) for column in zip(*rows)) for name, rows in parts.items()}
        return joined, np.concatenate(labels), np.concatenate(indexes)
