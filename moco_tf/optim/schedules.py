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


def warmup_cosine(epoch, epochs, base, warmup_epochs=0):
    """From 0 in a line to `base` at `warmup_epochs`, then to 0 at `epochs` along half a cosine (MoCo v3)."""
    decaying = half_cosine(epoch - warmup_epochs, epochs - warmup_epochs, base)
    return tf.where(epoch < warmup_epochs, base * epoch / max(warmup_epochs, 1), decaying)


def deit(epoch, epochs, base, warmup_epochs=0, start=1e-6, minimum=1e-5):
    """From `start` in a line towards `base` at `warmup_epochs`, then on to `minimum` along half a cosine that began at
    epoch 0 (DeiT, arXiv:2012.12877). As in its code, every epoch but the first has the value of the one before."""
    epoch = tf.maximum(epoch - 1.0, 0.0)
    warming = start + epoch * (base - start) / max(warmup_epochs, 1)
    return tf.where(epoch < warmup_epochs, warming, minimum + half_cosine(epoch, epochs, base - minimum))


SCHEDULES = {"steps": steps, "half_cosine": half_cosine, "warmup_cosine": warmup_cosine, "deit": deit}


class EpochSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule's value for the optimizer's step.

    Args:
        name: in SCHEDULES.
        base: the learning rate, at its highest.
        epochs: of the run.
        steps_per_epoch: in optimizer steps.
        per_step: follow the curve within the epoch too; else one value an epoch, as MoCo v1 and v2 have it.
        first_epoch: number of the run's first epoch, 0 or 1.
        warmup_epochs: the value rises linearly over these first epochs: by the curve itself if it takes this number,
            else from 0, within the epoch, in place of what the curve has there.
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
        own_warmup = {"warmup_epochs": warmup_epochs} if "warmup_epochs" in takes else {}
        self.line_until = 0 if own_warmup else warmup_epochs
        self.config = dict(name=name, base=base, epochs=epochs, steps_per_epoch=steps_per_epoch, per_step=per_step,
                           warmup_epochs=warmup_epochs, first_epoch=first_epoch, **options)
        self.curve = lambda epoch: SCHEDULES[name](epoch, epochs, base, **options, **own_warmup)

    def __call__(self, step):
        config = self.config
        position = tf.cast(step, keras.backend.floatx()) / config["steps_per_epoch"]
        value = self.curve(config["first_epoch"] + (position if config["per_step"] else tf.floor(position)))
        if self.line_until:
            value = tf.where(position < self.line_until, config["base"] * position / self.line_until, value)
        return value

    def get_config(self):
        return dict(self.config)
