"""A process that is one of several hosts, or all alone, and trains methods for five steps each, on a tiny encoder.

    python tests/hosts.py REPLICAS FOLDER RUN ...

With TF_CONFIG in the environment it is one of the hosts that this names, and REPLICAS is 0; otherwise it has so many
logical CPU devices. RUN: a key of RUNS, of which "input" takes its permutations from the pipeline, those of two hosts
in any case, and the others draw them in the step. FOLDER has images.npy; the process, of several the first, writes
RUN.npz.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import tensorflow as tf

from moco_tf.data.pipeline import training_batches
from moco_tf.data.sources import open_source
from moco_tf.distribute import Hosts, make_strategy
from moco_tf.methods.end_to_end import EndToEnd
from moco_tf.methods.insdis import CMC, InsDis
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3
from moco_tf.normalization import ALL_REPLICAS, BatchNorm
from moco_tf.optim.lars import LARS
from moco_tf.optim.sgd import SGD
from moco_tf.train import set_precision
from moco_tf.views.recipes import RECIPES

keras = tf.keras

BATCH, GROUP, DIM, IMAGES = 16, 4, 8, 40    # two steps an epoch
MOMENTUM = dict(dim=DIM, temperature=0.2, momentum=0.9, bn_group_size=GROUP)


def encoder(group=GROUP, hidden=0, branches=(3,)):
    """Images (B, 8, 8, 3) -> (B, V * DIM), each branch from channels of its own."""
    images, outputs, first = keras.Input((8, 8, 3)), [], 0
    for count in branches:
        x = keras.layers.Conv2D(4, 3, use_bias=False)(images[..., first:first + count])
        x = tf.nn.relu(BatchNorm(group)(x))
        x = keras.layers.GlobalAveragePooling2D()(x)
        outputs.append(keras.layers.Dense(DIM)(keras.layers.Dense(hidden, "relu")(x) if hidden else x))
        first += count
    return keras.Model(images, tf.concat(outputs, axis=1))


def moco(shuffle_bn, **options):
    return MoCo(encoder(**options), queue_size=24, shuffle_bn=shuffle_bn, **MOMENTUM)


def v3():
    rows = keras.Input((DIM,))
    predictor = keras.Model(rows, BatchNorm(ALL_REPLICAS)(keras.layers.Dense(DIM, use_bias=False)(rows)))
    return MoCoV3(encoder(ALL_REPLICAS, hidden=8), predictor, temperature=0.2, momentum=0.9)


RUNS = {"moco_v1": lambda: moco("cross_replica"), "moco_v2": lambda: moco("cross_replica", hidden=8),
        "input": lambda: moco("input"), "moco_v3": v3,
        "insdis": lambda: InsDis(encoder(), DIM, IMAGES, 0.2, num_negatives=12, loss="nce"),
        "insdis_full": lambda: InsDis(encoder(), DIM, IMAGES, 0.2),
        "cmc": lambda: CMC(encoder(branches=(1, 2)), DIM, bank_size=IMAGES, temperature=0.2, num_negatives=12,
                           loss="nce"),
        "end_to_end": lambda: EndToEnd(encoder(), DIM, 0.2, shuffle_bn="cross_replica", bn_group_size=GROUP)}


def batches(source, recipe, replicas, context, shuffle):
    """As the hosts that `context` counts, each by itself, would deal them to this process' replicas."""
    def of_host(context, replicas):
        return training_batches(source, recipe, BATCH, IMAGES // BATCH, seed=0, shuffle=shuffle, bn_group_size=GROUP,
                                replicas=replicas, context=context)

    if context.num_input_pipelines > 1 or not shuffle:
        return of_host(context, replicas // context.num_input_pipelines)
    both = tf.data.Dataset.zip(tuple(of_host(tf.distribute.InputContext(2, host, 2), 1) for host in range(2)))
    if replicas == 1:
        return both.map(lambda *parts: {name: tf.concat([part[name] for part in parts], axis=0) for name in parts[0]})
    return both.map(lambda *parts: {name: tf.stack([part[name] for part in parts]) for name in parts[0]}).unbatch()


def learned(strategy, run, folder):
    """{name: array} of what five steps have made."""
    keras.backend.clear_session()    # names as those of a process that trains this one alone
    keras.utils.set_random_seed(0)
    with strategy.scope():
        method = RUNS[run]()
        method.normalize = lambda images: tf.cast(images, keras.backend.floatx()) / 128.0 - 1.0
        method.compile(optimizer=LARS(0.5) if run == "moco_v3" else SGD(0.1, momentum=0.9))
        method.optimizer.build(method.trainable_weights)
    source = open_source("arrays", f"{folder}/images.npy")
    recipe = RECIPES["quickstart"](size=8, names=method.view_names, xla=False)
    dataset = strategy.distribute_datasets_from_function(
        lambda context: batches(source, recipe, strategy.num_replicas_in_sync, context, run == "input"))
    logged = []

    class Log(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs):
            logged.append([logs[name] for name in ("loss", "accuracy", "gradient_norm")])

    method.fit(dataset, steps_per_epoch=5, epochs=1, verbose=0, callbacks=[Log()])
    variables = [*method.weights, *method.optimizer.variables]
    return {"logs": np.array(logged), **{f"{i} {v.name}": v.numpy() for i, v in enumerate(variables)}}


def main(count, folder, runs):
    strategy, _ = make_strategy("multi_worker" if count == 0 else "mirrored" if count > 1 else "default", count)
    set_precision("float64")
    for run in runs:
        values = learned(strategy, run, folder)
        if Hosts(strategy).chief:
            np.savez(f"{folder}/{run}.npz", **values)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
