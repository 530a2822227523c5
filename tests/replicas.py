"""A process that trains five steps on so many logical CPU devices and writes down losses and weights.

    python tests/replicas.py REPLICAS SHUFFLE PRECISION OUT
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.data.pipeline import training_batches
from moco_tf.data.sources import open_source
from moco_tf.distribute import make_strategy
from moco_tf.train import build_method, normalizer, set_precision
from moco_tf.views.recipes import RECIPES


def main(replicas, shuffle, precision, out):
    strategy, _ = make_strategy("auto" if replicas == 1 else "mirrored", replicas)
    config = configs.override(configs.load("smoke"), **{
        "batch_size": 32, "bn_group_size": 8, "views.size": 12, "method.queue_size": 100, "shuffle_bn": shuffle,
        "optimizer.lr_per_256": 0.2 if precision == "float64" else 0.03, "precision": precision})
    set_precision(precision)
    source, recipe = open_source("embedded"), RECIPES["quickstart"](size=12, xla=False)
    with strategy.scope():
        method = build_method(config, steps_per_epoch=100, normalize_views=normalizer(recipe))
    dataset = strategy.distribute_datasets_from_function(lambda context: training_batches(
        source, recipe, 32, 100, seed=0, shuffle=shuffle == "input", bn_group_size=8, replicas=replicas, context=context))
    losses = []

    class Losses(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            losses.append([logs["loss"], logs["accuracy"], logs["feature_std"], logs["gradient_norm"]])

    method.fit(dataset, steps_per_epoch=5, epochs=1, verbose=0, callbacks=[Losses()])
    weights = {f"weight {i} {v.name}": v.numpy() for i, v in enumerate([*method.weights, *method.optimizer.variables])}
    np.savez(out, losses=np.array(losses), **weights)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
