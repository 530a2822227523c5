"""A process that trains five steps on so many logical CPU devices and writes down losses and weights.

    python tests/replicas.py REPLICAS WHAT PRECISION OUT

WHAT: a key of RUNS.
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
from moco_tf.train import build_method, construct, normalizer, set_precision
from moco_tf.views.recipes import RECIPES

MOCO = {"bn_group_size": 8, "method.queue_size": 100, "views.size": 12}
V3 = {"head.hidden_dim": 32, "head.dim": 16, "predictor.hidden_dim": 32, "schedule.warmup_epochs": 0, "views.size": 12}
RUNS = {    # recipe, changes, and the learning rate in float64, in float32 (the papers')
    "input": ("smoke", {**MOCO, "shuffle_bn": "input"}, 0.2, 0.03),
    "cross_replica": ("smoke", {**MOCO, "shuffle_bn": "cross_replica"}, 0.2, 0.03),
    "v3_resnet": ("moco_v3_r18_quickstart",
                  {**V3, "backbone.width": 0.0625, "backbone.stem": "cifar", "optimizer.weight_decay": 1e-3}, 5.0, 0.3),
    "v3_vit": ("moco_v3_vit_tiny_quickstart",
               {**V3, "backbone.dim": 16, "backbone.depth": 2, "backbone.heads": 2, "backbone.patch": 4}, 0.01, 1.5e-4)}
MEASURED = ("loss", "accuracy", "feature_std", "gradient_norm")


def main(replicas, what, precision, out):
    strategy, _ = make_strategy("auto" if replicas == 1 else "mirrored", replicas)
    recipe_name, changes, *lr = RUNS[what]
    config = configs.override(configs.load(recipe_name), **{
        **changes, "batch_size": 32, "optimizer.lr_per_256": lr[precision == "float32"], "precision": precision})
    set_precision(precision)
    source, recipe = open_source("embedded"), construct(RECIPES, config.views, "views", xla=False)
    with strategy.scope():
        method = build_method(config, steps_per_epoch=100, normalize_views=normalizer(recipe))
    dataset = strategy.distribute_datasets_from_function(lambda context: training_batches(
        source, recipe, 32, 100, seed=0, shuffle=config.shuffle_bn == "input",
        bn_group_size=max(config.bn_group_size, 0), replicas=replicas, context=context))
    logged = []

    class Log(tf.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            logged.append([logs[name] for name in MEASURED])

    method.fit(dataset, steps_per_epoch=5, epochs=1, verbose=0, callbacks=[Log()])
    weights = {f"weight {i} {v.name}": v.numpy() for i, v in enumerate([*method.weights, *method.optimizer.variables])}
    np.savez(out, losses=np.array(logged), **weights)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
