"""Training steps of CMC against the reference's: every run of kind `cmc_steps`, with its recorded negatives.

Compared after each step, as stored: both losses, what both memories return, features, Z, parameters and BatchNorm
statistics of both halves; after the last one both memories. Float64 takes the steps one after the other. Float32 takes
each from where float64 stands: a ReLU or a pooling near 0 may fall to the other side by rounding, gradients then jump,
and two runs that are both right part.
"""

import re
import zlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.export.torch_weights import state_dict
from moco_tf.losses import bank_logits
from moco_tf.methods.insdis import CMC
from moco_tf.optim.sgd import SGD

from . import replay, weights


class Watched(CMC):
    """CMC with given negatives, (steps, B, K), which also returns what the files hold of a step."""

    drawn = None

    def compare(self, queries, keys):
        losses, outputs = super().compare(queries, keys)
        logits = [bank_logits(queries[query], keys["rows"][key], self.temperature) for query, key in self.pairs]
        return losses, {**outputs, "logits": logits}

    def metrics_of(self, keys, outputs):
        (loss_l, loss_ab), (out_l, out_ab), noted = outputs["losses"], outputs["logits"], outputs["noted"]
        watched = {"loss_l": loss_l, "loss_ab": loss_ab, "feat_l": outputs["queries"][0]}
        if "partition" not in noted[0]:
            return {**watched, "out_l": out_l, "out_ab": out_ab}
        z_l, z_ab = (its["partition"] for its in noted)
        return {**watched, "out_l": tf.exp(out_l) / z_l, "out_ab": tf.exp(out_ab) / z_ab, "Z": tf.stack([z_l, z_ab])}

    def _draw(self, batch):
        return tf.gather(self.drawn, self.optimizer.iterations)


def slow_if(condition):
    return [pytest.mark.slow] * condition


@pytest.mark.parametrize("run", [pytest.param(run, id=run.id, marks=slow_if(run.settings["loss"] == "nce"))
                                 for run in replay.runs("cmc_steps", replay.has_encoder)])
def test_steps(run):
    methods = {tag: build(run, tag) for tag in sorted(run.tags)}    # f32 first
    step_of = {tag: tf.function(method.train_step, autograph=False) for tag, method in methods.items()}
    for step in range(run.settings["steps"]):
        methods["f64"].optimizer.learning_rate.assign(run.settings["lr"][step])
        for ours, exact in zip(variables_of(methods["f32"]), variables_of(methods["f64"])):
            ours.assign(tf.cast(exact, ours.dtype))
        for tag, method in methods.items():
            with replay.precision(tag):
                results = step_of[tag](views_of(run, tag, step))
            check_outputs(run, tag, step, results)
            check_state(run, tag, step, method)


def check_outputs(run, tag, step, results):
    for key in ("loss_l", "loss_ab", "out_l", "out_ab", "feat_l", "Z"):
        wanted = run[f"{tag}/{key}"][step]
        if key in results:
            replay.check(run, tag, results[key], wanted, f"{key} of step {step}", allowed(run, tag, key, step))
        else:
            assert (wanted == run.settings["z"]["init"]).all()    # there is no Z in a softmax


def check_state(run, tag, step, method):
    settings = run.settings
    state = {file_name(name): value for name, value in state_dict(method.encoder).items()}
    for branch, bank in zip(settings["branches"], method.banks):
        for key in run.keys(f"{tag}/{branch['prefix']}"):
            name, wanted = key.split("/")[-1], run[key][step]
            replay.check(run, tag, state[name].ravel()[:len(wanted)], wanted, f"{name} of step {step}",
                         allowed(run, tag, name, step))
        if step == settings["steps"] - 1:
            replay.check(run, tag, bank.rows.numpy()[:, :settings["memory_columns"]],
                         run[f"{tag}/memory_{branch['view']}_rows"], "memory", allowed(run, tag, "memory", step))


def variables_of(method):
    return [*method.weights, *method.optimizer.variables]


def build(run, tag):
    """The method of a run, compiled, as it stands before the first step."""
    settings, rules = run.settings, run.settings["optimizer"]
    with replay.precision(tag):
        method = Watched(replay.build_encoder(settings), dim=settings["dim"], bank_size=settings["n_data"],
                         temperature=settings["temperature"], num_negatives=settings["num_negatives"],
                         loss=settings["loss"], momentum=settings["momentum"])
        method.compile(SGD(settings["lr"][0], rules["momentum"], rules["weight_decay"], rules["nesterov"]))
        method.optimizer.build(method.trainable_variables)
    method.drawn = tf.constant(np.stack([run[settings["indices"]["idx"].format(step=step)][:, 1:]
                                         for step in range(settings["steps"])]))
    for branch, bank in zip(settings["branches"], method.banks):
        bank.rows.assign(weights.draw(settings["memory_init"][f"memory_{branch['view']}"]).astype(replay.DTYPES[tag]))
    return method


def views_of(run, tag, step):
    images = weights.draw(run.settings["inputs"], step=run.settings["first_step"] + step)
    assert "%08x" % zlib.crc32(images.tobytes()) == run.settings["inputs_crc32"][step]
    index = run[run.settings["indices"]["y"].format(step=step)]
    assert (run[run.settings["indices"]["idx"].format(step=step)][:, 0] == index).all()    # the positive, in column 0
    return {"query": tf.constant(images.astype(replay.DTYPES[tag])), "index": tf.constant(index)}


def allowed(run, tag, key, step):
    """What is not a loss has the tolerance of features."""
    return run.tolerance(tag, "loss" if key.startswith("loss") else "features", step)


def file_name(name):
    """The name in the files of a parameter of ours."""
    return re.sub(r"\.fc\.", ".fc8.0.", name)
