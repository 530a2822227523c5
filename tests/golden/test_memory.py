"""Memories, their losses and gradients, and alias tables against CMC's: every run of kinds `memory` and `alias_table`.

A run's calls follow each other on the same memory, with its recorded negatives: InsDis with one bank, CMC with a bank
for each view which the other view's features are scored against, and CMC's MoCo with a queue.
"""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.losses import bank_logits, contrastive_logits, estimated_partition, followed_partition, info_nce, nce
from moco_tf.memory import MemoryBank, Queue
from moco_tf.sampling import alias_table

from . import replay, weights


@pytest.mark.parametrize(**replay.cases("memory", lambda settings: settings["memory"] == "bank"))
def test_banks(run, tag):
    settings = run.settings
    with replay.precision(tag):
        banks = {name: MemoryBank(settings["n_data"], settings["dim"], settings["momentum"])
                 for name in settings["memory_init"]}
        for name, bank in banks.items():
            fill(bank.rows, settings, name, tag)
        scores = {view: Scores(settings, tag) for view in settings["inputs"]}
        for call in range(settings["calls"]):
            expected = f"{tag}/call{call}"
            index = run[f"call{call}/idx"]
            features = {view: inputs(settings, view, call, tag) for view in settings["inputs"]}
            with tf.GradientTape() as tape:
                tape.watch(features)
                results = {view: scores[view](bank_logits(
                    features[view], banks[settings["scored_against"][view]].read(index), settings["temperature"]))
                    for view in features}
                total = tf.add_n([tf.reduce_mean(losses) for _, losses in results.values()])
            gradients = tape.gradient(total, features)
            for view, (out, losses) in results.items():
                several = "" if len(results) == 1 else f"_{view}"
                replay.check(run, tag, out, run[f"{expected}/out{several}"], f"out{several}")
                replay.check(run, tag, tf.reduce_mean(losses), run[f"{expected}/loss{several}"], "loss")
                replay.check(run, tag, gradients[view], run[f"{expected}/grad{several}"], "grad")
                memory = f"memory{several}"    # a view's own bank: "memory_l" is of "l"
                banks[memory].update(run[f"call{call}/y"], features[view])
                replay.check(run, tag, banks[memory].rows, run[f"{expected}/{memory}"], memory)
            partitions = [scores[view].partition for view in settings["z"]["order"]]
            replay.check(run, tag, np.reshape(partitions, run[f"{expected}/Z"].shape), run[f"{expected}/Z"], "Z")


@pytest.mark.parametrize(**replay.cases("memory", lambda settings: settings["memory"] == "queue"))
def test_queues(run, tag):
    settings = run.settings
    with replay.precision(tag):
        queue = Queue(settings["queue_size"], settings["dim"])
        fill(queue.keys, settings, "memory", tag)
        scores = Scores(settings, tag)
        for call in range(settings["calls"]):
            expected = f"{tag}/call{call}"
            query, key = (inputs(settings, view, call, tag) for view in "qk")
            with tf.GradientTape() as tape:
                tape.watch(query)
                negatives = tf.convert_to_tensor(queue.keys)
                out, losses = scores(contrastive_logits(query, key, negatives, settings["temperature"]))
                loss = tf.reduce_mean(losses)
            queue.enqueue(key)
            replay.check(run, tag, out, run[f"{expected}/out"], "out")
            replay.check(run, tag, loss, run[f"{expected}/loss"], "loss")
            replay.check(run, tag, tape.gradient(loss, query), run[f"{expected}/grad_q"], "grad_q")
            replay.check(run, tag, queue.keys, run[f"{expected}/memory"], "memory")
            replay.check(run, tag, scores.partition, run[f"{expected}/Z"], "Z")
            assert int(queue.pointer) == run[f"{expected}/index"]


@pytest.mark.parametrize("run", replay.runs("alias_table"), ids=lambda run: run.id)
def test_alias_tables(run):
    acceptance, alias = alias_table(run["probs"])
    represented = (acceptance + np.bincount(alias, 1 - acceptance, minlength=len(alias))) / len(alias)
    tolerance = run.settings["tolerance"]["represented"]
    probabilities = run["probs"] / np.sum(run["probs"], dtype=np.float64)
    replay.check(run, "", represented, run["represented"], "represented", tolerance)
    replay.check(run, "", represented, probabilities, "probabilities", tolerance)


class Scores:
    """Logits -> what the reference's memory returns, exp(s/T) / Z or s/T, and the (N,) losses; keeps Z."""

    def __init__(self, settings, tag):
        self.settings, self.partition = settings, tf.constant(-1.0, replay.DTYPES[tag])

    def __call__(self, logits):
        if self.settings["loss"] == "softmax":
            return logits, info_nce(logits)
        size = self.settings["n_data"]
        self.partition = followed_partition(self.partition, estimated_partition(logits, size), momentum=1.0)
        if self.settings["z"]["integer"]:    # the reference's queue keeps it in an integer
            self.partition = tf.floor(self.partition)
        return tf.exp(logits) / self.partition, nce(logits, self.partition, size, self.settings["nce_eps"])


def fill(variable, settings, name, tag):
    variable.assign(weights.draw(settings["memory_init"][name]).astype(replay.DTYPES[tag]))


def inputs(settings, view, call, tag):
    return tf.constant(weights.draw(settings["inputs"][view], call=call).astype(replay.DTYPES[tag]))
