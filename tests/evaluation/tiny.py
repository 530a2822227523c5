"""What the tests here share: an encoder of a few weights, and class folders of small images."""

import numpy as np
import tensorflow as tf
from PIL import Image

from moco_tf import config as configs
from moco_tf.evaluation.encoders import Encoder
from moco_tf.heads import parts
from moco_tf.train import normalizer
from moco_tf.views.recipes import RECIPES

keras = tf.keras


def tiny_encoder():
    """8 x 8 images -> 6 features -> 3 embedded values, all linear."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    features = keras.layers.Dense(6, name="features")(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, keras.layers.Dense(3)(features))
    return Encoder("tiny", "a tiny encoder", parts(model), normalizer(RECIPES["eval"](size=8)), 8)


def write_splits(folder):
    """Makes train/ (3 classes x 40 images of 8 x 8) and val/ (3 x 20): noise, each class lighter than the last."""
    for split, count in (("train", 40), ("val", 20)):
        rng = np.random.default_rng(count)
        for label in range(3):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                light = np.clip(rng.normal(80 + 40 * label, 40, (8, 8, 3)), 0, 255)
                Image.fromarray(light.astype(np.uint8)).save(folder / split / f"class{label}" / f"{i:03d}.png")
    return folder


def config_of(images, **values):
    """The linear probe's config, to evaluate on a folder of images."""
    return configs.override(configs.load("linear_v1v2"), **{
        "data.name": "folder", "data.path": str(images), "fast.epochs": 5, "fast.batch_size": 16, **values})
