"""Runs of the command as processes of their own, to stop, and to compare by what they leave."""

import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import tensorflow as tf

from conftest import ROOT

TIMES = ("images_per_s", "data_wait")


def lines(workdir, name="metrics.jsonl"):
    return [json.loads(line) for line in (pathlib.Path(workdir) / name).read_text().splitlines()]


def final_state(workdir):
    """{name: value} of the newest checkpoint."""
    newest = max(pathlib.Path(workdir).glob("checkpoints/step-*.index"), key=lambda path: int(path.stem.split("-")[1]))
    reader = tf.train.load_checkpoint(str(newest.with_suffix("")))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map() if "OBJECT_GRAPH" not in name}


def assert_same_run(ours, expected):
    state, reference = final_state(ours), final_state(expected)
    assert state.keys() == reference.keys()
    for name, value in reference.items():
        if "save_counter" not in name:
            assert np.asarray(value).tobytes() == np.asarray(state[name]).tobytes(), name
    without_times = [[{k: v for k, v in line.items() if k not in TIMES} for line in lines(workdir)]
                     for workdir in (ours, expected)]
    assert without_times[0] == without_times[1]
    assert lines(ours, "monitor.jsonl") == lines(expected, "monitor.jsonl")


def start_and_stop_at(step, arguments, workdir, number):
    """Starts the command and sends the signal once metrics.jsonl has reached `step`; returns exit code and output."""
    process = subprocess.Popen([sys.executable, "-m", "moco_tf", *arguments, f"--workdir={workdir}"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 240
    metrics = workdir / "metrics.jsonl"
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= step:
            process.send_signal(number)
            break
        time.sleep(0.01)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output
