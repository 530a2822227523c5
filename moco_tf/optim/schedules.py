"""Learning rates over the course of a run, as pure functions of the epoch, and the object that Keras asks for one."""

import inspect
import math

import tensorflow as tf

from moco_tf.errors import UsageError

keras = tf.keras


def steps(epoch, epochs, base, milestones=(120, 160), gamma=0.1):
    """`base`, times `gamma` at each of the `milestones` that is reached (MoCo v1); epochs count from 0."""
    del epochs
    passed = tf.math.count_nonzero(epoch >= tf.constant(milestones, epoch.dtype), dtype=tf.int32)
    return base * tf.constant(gamma, epoch.dtype) ** tf.cast(passed, epoch.dtype)


def half_cosine(epoch, epochs, base):
    """From `base` at epoch 0 to 0 at `epochs`, along half a cosine (MoCo v2)."""
    return 0.5 * base * (1.0 + tf.cos(math.pi * epoch / epochs))


SCHEDULES = {"steps": steps, "half_cosine": half_cosine}


class EpochSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule's value for the optimizer's step.

    Args:
        name: in SCHEDULES.
        base: the learning rate at the start.
        epochs: of the run.
        steps_per_epoch: in optimizer steps.
        per_step: follow the curve within the epoch too; else one value an epoch, as MoCo v1 and v2 have it.
        first_epoch: number of the run's first epoch, 0 or 1.
        warmup_epochs: the value rises linearly from 0 over these first epochs, within the epoch.
        options: further arguments of the schedule.
    """

    def __init__(self, name, base, epochs, steps_per_epoch, per_step=False, warmup_epochs=0,
                 first_epoch=0, **options):
        if name not in SCHEDULES:
            raise UsageError(f"schedule.name must be one of {', '.join(SCHEDULES)}. Received: {name!r}.")
        takes = list(inspect.signature(SCHEDULES[name]).parameters)[3:]
        unknown = sorted(set(options) - set(takes))
        if unknown:
            raise UsageError(f"schedule {name!r} takes {', '.join(takes) or 'no options'}. Received besides: "
                             f"{', '.join(unknown)}. Start from a recipe with this schedule.")
        self.config = dict(name=name, base=base, epochs=epochs, steps_per_epoch=steps_per_epoch, per_step=per_step,
                           warmup_epochs=warmup_epochs, first_epoch=first_epoch, **options)
        self.curve = lambda epoch: SCHEDULES[name](epoch, epochs, base, **options)

    def __call__(self, step):
        config = self.config
        position = tf.cast(step, keras.backend.floatx()) / config["steps_per_epoch"]
        value = self.curve(config["first_epoch"] + (position if config["per_step"] else tf.floor(position)))
        if config["warmup_epochs"]:
            warm = config["base"] * position / config["warmup_epochs"]
            value = tf.where(position < config["warmup_epochs"], warm, value)
        return value

    def get_config(self):
        return dict(self.config)
