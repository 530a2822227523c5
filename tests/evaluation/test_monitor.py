"""What pre-training measures: view retrieval of several branches is across them, by NumPy."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf import config as configs
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.data.pipeline import Unreadable
from moco_tf.data.sources import open_source
from moco_tf.evaluation.features import Extractor
from moco_tf.evaluation.monitor import PretrainingMeasures
from moco_tf.heads import encoder as join, linear
from moco_tf.train import evaluation_recipe, normalizer
from moco_tf.views.recipes import RECIPES

keras = tf.keras
BRANCHES = (("red", 1), ("green", 1), ("blue", 1))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """60 images in train/ and val/ each, whose three channels are alike but for noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for i in range(60):
            (folder / split / str(i % 2)).mkdir(parents=True, exist_ok=True)
            image = rng.normal(128, 40, (8, 8, 1)) + rng.normal(0, 25, (8, 8, 3))
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / split / str(i % 2) / f"{i}.png")
    return folder


def flat(channels):
    image = keras.Input((8, 8, channels))
    return keras.Model(image, keras.layers.Flatten(name="features")(image))


def test_view_retrieval_of_branches_is_one_branchs_by_anothers(images):
    model = join(branched_backbone(BRANCHES, flat, 8), lambda features: branched_head(
        BRANCHES, lambda rows: linear(rows, dim=6), features))
    kernel = np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32)
    for name, _ in BRANCHES:
        model.get_layer(f"{name}.fc").kernel.assign(kernel)
    train, held_out = (open_source("folder", str(images), split) for split in ("train", "val"))
    recipe = RECIPES["train_linear"](size=8)
    measure = PretrainingMeasures(
        configs.load("smoke").monitor, train, held_out, recipe, evaluation_recipe(8, train, shorter_side=8),
        Extractor(model, normalizer(recipe)), 0, 16, 0, 0, Unreadable(train, 0.0), branches=3)
    values = measure()

    pixels = np.stack([tf.io.decode_png(tf.io.read_file(held_out.describe(i)), 3) for i in range(60)])
    own = model(normalizer(recipe)(pixels)).numpy().reshape(60, 3, 6)
    own /= np.linalg.norm(own, axis=2, keepdims=True)
    found = [np.argmax(own[:, i] @ own[:, j].T, axis=1) == np.arange(60) for i in range(3) for j in range(3) if i != j]
    assert 0.2 < np.mean(found) < 0.95 and set(values) == {"knn_top1", "view_retrieval"}
    assert values["view_retrieval"] == pytest.approx(np.mean(found))

    whole = measure.whole_images
    measure.whole_images = lambda batches: (whole(batches)[0], np.full(60, -1), None)
    assert set(measure()) == {"view_retrieval"}    # a split without labels has none that could vote
