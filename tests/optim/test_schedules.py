"""Schedules by hand; the published runs' curves are in tests/golden."""

import math

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.optim.schedules import EpochSchedule


def values(schedule, steps):
    return [float(schedule(tf.constant(step, tf.int64))) for step in steps]


def test_warmup_cosine_starts_at_zero_and_its_clock_after_the_warm_up():
    schedule = EpochSchedule("warmup_cosine", 2.0, epochs=10, steps_per_epoch=4, per_step=True, warmup_epochs=2)
    # Half-way up, at the top, half-way down, a step before the end.
    expected = [0.0, 1.0, 2.0, 1.0, 1.0 - math.cos(math.pi / 32)]
    np.testing.assert_allclose(values(schedule, [0, 4, 8, 24, 39]), expected, rtol=1e-4)


def test_warmup_cosine_without_warm_up_is_half_a_cosine():
    ours, plain = (EpochSchedule(name, 1.0, epochs=5, steps_per_epoch=2) for name in ("warmup_cosine", "half_cosine"))
    np.testing.assert_allclose(values(ours, range(10)), values(plain, range(10)), rtol=1e-6)


def test_deit_lags_an_epoch_warms_up_in_a_line_and_keeps_its_minimum():
    """The values of DeiT's code for ImageNet: 300 epochs, rate 1e-3, five to warm up."""
    schedule = EpochSchedule("deit", 1e-3, epochs=300, steps_per_epoch=7, warmup_epochs=5, start=1e-6, minimum=1e-5)

    def cosine(t):
        return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / 300))

    line = [1e-6 + t * (1e-3 - 1e-6) / 5 for t in range(5)]
    at = {0: line[0], 1: line[0], 2: line[1], 5: line[4], 6: cosine(5), 151: cosine(150), 299: cosine(298)}
    np.testing.assert_allclose(values(schedule, [7 * epoch + 3 for epoch in at]), list(at.values()), rtol=1e-5)


def test_the_others_may_be_warmed_up_too():
    schedule = EpochSchedule("steps", 1.0, epochs=9, steps_per_epoch=2, warmup_epochs=2, milestones=(3,))
    np.testing.assert_allclose(values(schedule, [0, 1, 2, 4, 5, 6]), [0, 0.25, 0.5, 1, 1, 0.1], rtol=1e-6)


def test_unknown_options_are_refused_with_those_there_are():
    with pytest.raises(UsageError, match="'deit' takes warmup_epochs, start, minimum.*warm_up"):
        EpochSchedule("deit", 1.0, 5, 2, warm_up=3)
    with pytest.raises(UsageError, match="warmup_cosine"):
        EpochSchedule("cosine", 1.0, 5, 2)
