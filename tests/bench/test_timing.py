"""moco_tf/bench/timing.py: what it says of work whose time is known."""

import os
import subprocess
import sys
import time

import pytest

from moco_tf.bench import timing
from moco_tf.errors import DataError, MocoError


def spinning(seconds, units):
    yield {"pid": os.getpid(), "mark": os.environ.get("MARK")}
    while True:
        yield timing.timed(lambda: spin(seconds), units)


def sleeping(seconds, units):
    yield {}
    while True:
        yield timing.timed(lambda: time.sleep(seconds), units)


def dying():
    yield {}
    os._exit(1)


def failing(error):
    yield {}
    raise error


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_cases_have_processes_of_their_own_and_tell_work_from_waiting():
    measured = timing.in_turns({"work": (spinning, dict(seconds=0.2, units=2)),
                                "wait": (sleeping, dict(seconds=0.2, units=4))}, rounds=3, environment={"MARK": "here"})
    work, wait = measured["work"], measured["wait"]
    assert work.facts["pid"] != os.getpid() and work.facts["mark"] == "here" and "MARK" not in os.environ
    assert 100 <= work.cpu_ms <= 115 and work.wall_ms >= 100
    assert wait.cpu_ms < 5 and wait.wall_ms >= 50
    assert len(work.rounds) == 3 and work.spread()[0] <= work.wall_ms <= work.spread()[1]
    assert work.peak_mib > 1 and work.setup_s < 60


def test_the_ratio_is_that_of_rounds_side_by_side():
    def of(*walls):
        return timing.Measured({}, 0.0, [timing.Round(10, wall, 2 * wall) for wall in walls], 0.0)

    assert timing.ratio(of(1.0, 20.0, 3.0), of(2.0, 10.0, 2.0)) == 1.5    # of 0.5, 2 and 1.5
    assert of(1.0, 20.0, 3.0).wall_ms == 300 and of(1.0, 20.0, 3.0).cpu_ms == 600


def test_processes_that_a_case_starts_count():
    def in_another():
        child = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < .3: pass\ninput()"],
                                 stdin=subprocess.PIPE)
        try:
            before = timing.cpu_seconds()
            time.sleep(0.1)
            timing.settle()
            return timing.cpu_seconds() - before
        finally:
            child.communicate(b"\n")

    assert 0.1 < in_another() < 0.6


def test_a_case_that_is_killed_is_named():
    with pytest.raises(MocoError, match="case 'bad' ended without an answer"):
        timing.in_turns({"bad": (dying, {})}, rounds=2)


@pytest.mark.parametrize("error, said", [(DataError("no such image"), "^no such image$"), (ValueError("7"), "failed: ValueError: 7")])
def test_a_case_that_fails_says_why(error, said):
    with pytest.raises(DataError if isinstance(error, DataError) else MocoError, match=said):
        timing.in_turns({"bad": (failing, dict(error=error))}, rounds=1)
