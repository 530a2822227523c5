"""Learning rates over whole runs: every run of kind `schedule` whose curve exists here."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.optim.schedules import EpochSchedule

from . import replay


def supported(settings):
    """Steps and cosine by the epoch. MoCo v3's warm-up and momentum curves are not here yet."""
    return settings["quantity"] == "lr" and settings["rule"] in ("step", "cosine")


@pytest.mark.parametrize("run", replay.runs("schedule", supported), ids=lambda run: run.id)
def test_schedule(run):
    settings, at = run.settings, run.settings["at"]
    options = {} if settings["rule"] == "cosine" else dict(milestones=settings["milestones"], gamma=settings["gamma"])
    with replay.precision("f64"):
        schedule = EpochSchedule({"step": "steps", "cosine": "half_cosine"}[settings["rule"]], settings["base"],
                                 settings["epochs"], at["iterations_per_epoch"], **options)
        # CMC counts epochs from 1 and steps down once a milestone is passed: counted from 0, once it is reached.
        first = 1 if settings["milestone_passed"] == "epoch > milestone" else 0
        steps = [(epoch - first) * at["iterations_per_epoch"] + iteration
                 for epoch in range(at["epoch_start"], at["epoch_stop"], at["epoch_step"])
                 for iteration in at["iterations"]]
        values = [schedule(tf.constant(step, tf.int64)) for step in steps]
    replay.check(run, "f64", np.array(values), np.ravel(run.file[run.name]), "lr")
