"""Timing side by side: every case has a process of its own, and they take turns, so that what else the machine does meets
all alike.

A case is a generator function, importable by its name. What it does up to its first `yield` is its set-up; it yields a
dict of facts there, and at each turn that follows a `Round`:

    def ours(batch_size):
        step = build(batch_size)
        yield {"parameters": 11_000_000}
        while True:
            yield timed(lambda: [step() for _ in range(10)], units=10 * batch_size)

    measured = in_turns({"ours": (ours, dict(batch_size=32)), "theirs": (theirs, dict(batch_size=32))}, rounds=5)
    print(measured["ours"].wall_ms, ratio(measured["theirs"], measured["ours"]))
"""

import dataclasses
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import time
import traceback
from typing import NamedTuple

from tqdm import tqdm

from moco_tf.errors import MocoError

QUIET = 0.05    # of a core: a process that takes less has nothing more to do


class Round(NamedTuple):
    """One turn of a case."""

    units: int       # of what was done: images, steps
    wall_s: float    # that it took
    cpu_s: float     # of all threads, and of the processes that the case has started


@dataclasses.dataclass
class Measured:
    """What `in_turns` has to tell of a case: its facts, how long its set-up took, its rounds, its peak memory."""

    facts: dict
    setup_s: float
    rounds: list
    peak_mib: float    # resident, of the process alone

    def of_units(self, name):
        """A value of `Round` for one unit, in ms, of each round."""
        return [1e3 * getattr(turn, name) / turn.units for turn in self.rounds]

    @property
    def wall_ms(self):
        """Median over the rounds, of one unit."""
        return statistics.median(self.of_units("wall_s"))

    @property
    def cpu_ms(self):
        """Median over the rounds, of one unit."""
        return statistics.median(self.of_units("cpu_s"))

    def spread(self, name="wall_s"):
        """(least, most) over the rounds, in ms, of one unit."""
        values = self.of_units(name)
        return min(values), max(values)

    def summary(self):
        """For a report in JSON."""
        return {**self.facts, "wall_ms": self.wall_ms, "cpu_ms": self.cpu_ms, "wall_ms_rounds": self.of_units("wall_s"),
                "cpu_ms_rounds": self.of_units("cpu_s"), "setup_s": self.setup_s, "peak_mib": self.peak_mib}


def ratio(numerator, denominator, name="wall_s"):
    """Median over the rounds of one case's time for a unit over the other's of the same round."""
    return statistics.median(a / b for a, b in zip(numerator.of_units(name), denominator.of_units(name)))


def timed(function, units):
    """Calls the function; a Round of so many units."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    function()
    return Round(units, time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds():
    """Of this process and of all that it has started and that still run (those only where there is a /proc)."""
    return time.process_time() + sum(_cpu_seconds_of(child) for child in _descendants(os.getpid()))


def _descendants(pid):
    for file in pathlib.Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = file.read_text().split()
        except OSError:    # a thread that has ended
            continue
        for child in children:
            yield child
            yield from _descendants(child)


def _cpu_seconds_of(pid):
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def settle(longest=10.0):
    """Waits until this process has nothing more to do, such as filling buffers; `longest` seconds at most."""
    end = time.perf_counter() + longest
    while time.perf_counter() < end:
        before = cpu_seconds()
        time.sleep(0.2)
        if cpu_seconds() - before < 0.2 * QUIET:
            return


def in_turns(cases, rounds, unit="round", environment=None):
    """Measures cases side by side.

    Args:
        cases: {name: (generator function, its keyword arguments)}; both are pickled.
        rounds: turns of each case.
        unit: of the progress bar.
        environment: {name: value} of environment variables of all cases.

    Returns:
        {name: Measured}.

    Raises:
        MocoError: a case has failed; its own message follows.
    """
    spawn, running = multiprocessing.get_context("spawn"), {}
    before = {name: os.environ.get(name) for name in environment or {}}
    os.environ.update(environment or {})
    try:
        for name, (function, arguments) in cases.items():
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs, function, arguments))
            process.start()
            theirs.close()
            running[name] = (process, ours)
            facts, setup_s = _answer(name, ours)
            running[name] += (Measured(facts, setup_s, [], 0.0),)
        for _ in tqdm(range(rounds), desc="rounds in turns", unit=unit, disable=None):
            for name, (_, pipe, measured) in running.items():
                turn, measured.peak_mib = _answer(name, pipe, ask=True)
                measured.rounds.append(turn)
    finally:
        for process, *_ in running.values():
            process.terminate()
            process.join()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return {name: measured for name, (_, _, measured) in running.items()}


def _answer(name, pipe, ask=False):
    try:
        if ask:
            pipe.send(True)
        good, answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise MocoError(f"The benchmark's case {name!r} ended without an answer; perhaps memory ran out. Take a smaller "
                        "batch.") from None
    if not good:
        raise answer if isinstance(answer, MocoError) else MocoError(f"The benchmark's case {name!r} failed: {answer}")
    return answer


def _serve(pipe, function, arguments):
    """The life of a case's process."""
    try:
        began, turns = time.perf_counter(), function(**arguments)
        facts = next(turns)
        pipe.send((True, (facts, time.perf_counter() - began)))
        while pipe.recv():
            settle()
            turn = next(turns)
            settle()
            pipe.send((True, (turn, peak_mib())))
    except EOFError:
        pass
    except MocoError as error:
        pipe.send((False, error))
    except Exception as error:
        traceback.print_exc()
        pipe.send((False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"))


def peak_mib():
    """The most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
