"""Learning rates and momenta over whole runs: every run of kind `schedule`, in float64 and float32."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.methods.moco_v3 import MoCoV3
from moco_tf.optim.schedules import EpochSchedule

from . import replay

keras = tf.keras


@pytest.mark.parametrize("run", replay.runs("schedule"), ids=lambda run: run.id)
@pytest.mark.parametrize("tag", ["f64", "f32"])
def test_schedule(run, tag):
    settings, at = run.settings, run.settings["at"]
    # CMC counts epochs from 1 and steps down once a milestone is passed: counted from 0, once it is reached.
    first = 1 if settings["milestone_passed"] == "epoch > milestone" else 0
    steps = [(epoch - first) * at["iterations_per_epoch"] + iteration
             for epoch in range(at["epoch_start"], at["epoch_stop"], at["epoch_step"])
             for iteration in at["iterations"]]
    with replay.precision(tag):
        value_at = {"lr": learning_rate, "momentum": momentum}[settings["quantity"]](settings)
        values = [value_at(tf.constant(step, tf.int64)) for step in steps]
    replay.check(run, tag, np.array(values), np.ravel(run.file[run.name]), settings["quantity"],
                 {"f64": 1e-12, "f32": 2e-6}[tag])


def learning_rate(settings):
    name, options = {
        "step": ("steps", dict(milestones=settings["milestones"], gamma=settings["gamma"])),
        "cosine": ("half_cosine", {}),
        "warmup_cosine": ("warmup_cosine", dict(warmup_epochs=settings["warmup_epochs"], per_step=True)),
    }[settings["rule"]]
    return EpochSchedule(name, settings["base"], settings["epochs"], settings["at"]["iterations_per_epoch"], **options)


def momentum(settings):
    """As the method has it, step after step."""
    embeddings = keras.Input((2,))
    method = MoCoV3(keras.Model(embeddings, embeddings), keras.Model(embeddings, embeddings), temperature=1.0,
                    momentum=settings["base"], momentum_schedule="cosine",
                    total_steps=settings["epochs"] * settings["at"]["iterations_per_epoch"])
    method.compile("sgd")

    def momentum_at(step):
        method.optimizer.iterations.assign(step)
        return method.momentum_now()

    return momentum_at
