"""Uses exports as somebody without moco_tf does: python -I use_export.py IN.npz OUT.npz.

IN.npz holds paths and inputs by the names below; OUT.npz gets what came of them, for test_saved_model.py to compare.
"""

import sys

import numpy as np
import tensorflow as tf

sys.modules["moco_tf"] = None    # where the package is installed: an import fails as if it were not
try:
    import moco_tf
    raise SystemExit("moco_tf can be imported, which would make all this vain")
except ImportError:
    pass

given, found = np.load(sys.argv[1]), {}


class Signature(tf.keras.layers.Layer):
    """A signature as a Keras layer, as Keras 3's TFSMLayer makes one."""

    def __init__(self, path):
        super().__init__()
        self.loaded = tf.saved_model.load(path)
        self.function = self.loaded.signatures["features"]
        self.learnt = self.loaded.trainable_variables

    def call(self, images):
        return self.function(images=images)["features"]


def load(name):
    return tf.saved_model.load(str(given[name]))


def keep(name, values):
    found.update({f"{name}_{key}": value.numpy() for key, value in values.items()})


def statistics(model):
    return [v.numpy() for v in model.variables if "moving_" in v.name]


for name in ("resnet", "vit", "cmc"):
    loaded, images = load(name), tf.constant(given[f"{name}_images"])
    found[f"{name}_call"] = loaded(images).numpy()
    found[f"{name}_one"] = loaded(images[:1], training=False).numpy()
    for signature in ("features", "embedding"):
        keep(name, loaded.signatures[signature](images=images))
    bytes_of = tf.constant([bytes(content) for content in given[f"{name}_bytes"]])
    found[f"{name}_serving"] = loaded.signatures["serving_bytes"](image_bytes=bytes_of)["features"].numpy()
    other = tf.constant(given["wide"]) if name == "resnet" else images
    keep(name, loaded.signatures["tokens" if name == "vit" else "pyramid"](images=other))
    for branch in ("l_to_ab", "ab_to_l") if name == "cmc" else ():
        keep(f"{name}_{branch}", loaded.signatures[branch](images=images))
    found[f"{name}_constants"] = [loaded.size.numpy(), loaded.shorter_side.numpy(), *loaded.mean.numpy()]

    # A gradient step in each mode. In inference mode the moving statistics stay; otherwise they move.
    for training in (True, False):
        at_start, variables = statistics(loaded), loaded.trainable_variables
        before = [v.numpy() for v in variables]
        target = tf.constant(given[f"{name}_target"])
        losses = []
        for _ in range(2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(loaded(images, training=training) - target))
            losses.append(loss.numpy())
            gradients = tape.gradient(loss, variables)
            if len(losses) == 1:
                first = statistics(loaded)
                norm = tf.linalg.global_norm(gradients)
                for variable, gradient in zip(variables, gradients):
                    variable.assign_sub(1e-3 * gradient / norm)
        found[f"{name}_losses_{training}"] = losses
        found[f"{name}_changed_{training}"] = [bool(np.any(a != b)) for a, b in zip(before, variables)]
        found[f"{name}_moved_{training}"] = [bool(np.any(a != b)) for a, b in zip(at_start, first)]
        if training and name == "resnet":
            found["resnet_statistics"] = np.concatenate(first)
    assert list(loaded.regularization_losses) == []

layer = Signature(str(given["resnet"]))
model = tf.keras.Sequential([tf.keras.Input(given["resnet_images"].shape[1:]), layer, tf.keras.layers.Dense(2)])
model.compile(tf.keras.optimizers.SGD(1e-3), "mse")
history = model.fit(given["resnet_images"], np.eye(2)[np.arange(len(given["resnet_images"])) % 2], epochs=5, verbose=0)
found["layer_losses"], found["layer_variables"] = history.history["loss"], len(layer.trainable_variables)

backbone = tf.keras.models.load_model(f"{given['resnet']}/backbone.keras", compile=False)
normalised = (given["resnet_images"] - given["mean"]) / given["std"]
found["keras"] = backbone(normalised.astype(np.float32), training=False).numpy()
found["keras_layers"] = sorted({type(layer).__name__ for layer in backbone.layers})
backbone.set_weights([0 * w for w in backbone.get_weights()])
backbone.load_weights(f"{given['resnet']}/backbone.weights.h5")
found["weights"] = backbone(normalised.astype(np.float32), training=False).numpy()
backbone = tf.keras.models.load_model(f"{given['cmc']}/backbone.keras", compile=False)
found["cmc_keras"] = backbone(given["cmc_lab"], training=False).numpy()
found["cmc_keras_layers"] = sorted({type(layer).__name__ for layer in backbone.layers})

for name in ("resnet", "vit", "cmc"):
    lite = tf.lite.Interpreter(f"{given[name]}/features.tflite")
    images = given[f"{name}_images"]
    place = lite.get_input_details()[0]["index"]
    for count in (1, len(images)):    # any batch
        lite.resize_tensor_input(place, (count, *images.shape[1:]))
        lite.allocate_tensors()
        lite.set_tensor(place, images[:count])
        lite.invoke()
        found[f"{name}_lite_{count}"] = lite.get_tensor(lite.get_output_details()[0]["index"])

np.savez(sys.argv[2], **found)
