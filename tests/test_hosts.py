"""Several hosts: two processes with TF_CONFIG train as one, share out an epoch, stop together, and outlive each other;
a tf.data service makes their views."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import hosts
from conftest import ROOT, TINY, moco_tf
from moco_tf.callbacks import Checkpoints, StopOnSignal
from moco_tf.data.pipeline import training_batches
from moco_tf.data.service import DataService
from moco_tf.data.sources import open_source
from moco_tf.data.tools import pack
from moco_tf.distribute import Hosts, make_strategy
from moco_tf.errors import DataError, Preempted, UsageError
from moco_tf.shuffling import key_permutation
from moco_tf.views.recipes import RECIPES
from runs import assert_same_run, lines

QUIET = 600    # seconds that anything may take
PRETRAIN = ["-m", "moco_tf", "pretrain", f"--config={ROOT / 'tests' / 'hosts_config.py'}"]    # 40 steps


def free_ports(count):
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextlib.contextmanager
def processes():
    """A function that starts a process, arguments of Python and changes of the environment -> Popen; all are killed at
    the end."""
    started = []

    def start(arguments, **environment):
        started.append(subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}))
        return started[-1]

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()
            process.stdout.close()


def start_hosts(start, arguments, own=(), count=2):
    """One process a host; `own` are arguments of which each has one."""
    cluster = {"worker": [f"localhost:{port}" for port in free_ports(count)]}
    return [start([*arguments, *own[index:index + 1]], TF_CONFIG=json.dumps(
        {"cluster": cluster, "task": {"type": "worker", "index": index}})) for index in range(count)]


def ended(running, seconds=QUIET):
    """[(exit code, output)] of processes that must end by themselves."""
    outputs = [process.communicate(timeout=seconds)[0] for process in running]
    return [(process.returncode, output) for process, output in zip(running, outputs)]


# ---------------------------------------------------------------------------------------------- as one

def learned(folder, replicas, names):
    """{run: what it has made} of `replicas` logical devices in one process, or of two hosts for 0."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (hosts.IMAGES, 12, 12, 3), np.uint8)
    np.save(folder / "images.npy", images)
    arguments = [ROOT / "tests" / "hosts.py", replicas, folder, *names]
    with processes() as start:
        for code, output in ended(start_hosts(start, arguments) if replicas == 0 else [start(arguments)]):
            assert code == 0, output
    return {name: np.load(folder / f"{name}.npz") for name in names}


def assert_equal(ours, expected):
    """In float64, where nothing but a difference of the mathematics can show; 1e-5 with room to spare."""
    for name, values in ours.items():
        assert values.files == expected[name].files
        for key in values.files:
            scale = np.abs(expected[name][key]).max(initial=1e-3)
            np.testing.assert_allclose(values[key], expected[name][key], rtol=0, atol=1e-9 * scale,
                                       err_msg=f"{name}: {key}")


FIRST = ("moco_v2", "input")


def test_two_hosts_train_as_one_device(tmp_path):
    assert_equal(learned(tmp_path / "hosts", 0, FIRST), learned(tmp_path / "one", 1, FIRST))


@pytest.mark.slow
def test_two_hosts_and_two_devices_train_all_methods_as_one_device(tmp_path):
    one = learned(tmp_path / "one", 1, hosts.RUNS)
    assert_equal(learned(tmp_path / "hosts", 0, [name for name in hosts.RUNS if name not in FIRST]), one)
    assert_equal(learned(tmp_path / "devices", 2, hosts.RUNS), one)


# ---------------------------------------------------------------------------------------------- the input of a host

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of 50 PNG files of various sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(50):
        image = rng.integers(0, 256, (90, 80 + i, 3), np.uint8)
        tf.io.write_file(str(folder / f"{i:02d}.png"), tf.io.encode_png(image))
    return folder


def batches_of(source, host, count, replicas=2, **options):
    recipe = RECIPES["quickstart"](size=8, xla=False)
    context = tf.distribute.InputContext(2, host, 2 * replicas)
    batches = training_batches(source, recipe, 16, 3, seed=1, bn_group_size=2, replicas=replicas, context=context,
                               **options)
    return [{name: value.numpy() for name, value in batch.items()} for batch in batches.take(count * replicas)]


@pytest.mark.parametrize("kind", ["folder", "records"])
def test_two_hosts_share_out_an_epoch(photos, tmp_path, kind):
    path = str(photos)
    if kind == "records":
        path = str(tmp_path / "packed")
        pack(str(photos), path, shards=3)
    source = open_source(kind, path)
    of_hosts = [np.reshape([batch["index"] for batch in batches_of(source, host, 6)], [6, 8]) for host in range(2)]
    seen = np.concatenate(of_hosts, axis=1)    # (step, image)
    for epoch in (seen[:3], seen[3:]):
        assert len(set(epoch.flat)) == 48    # three batches of 16, of 50 images
    alone = [batch["index"].numpy() for batch in training_batches(
        source, RECIPES["quickstart"](size=8, xla=False), 16, 3, seed=1, bn_group_size=2).take(6)]
    np.testing.assert_array_equal(seen, alone)    # the number of hosts changes nothing


def test_the_permutation_of_a_host_keeps_groups_apart_and_within_the_host(photos):
    source = open_source("folder", str(photos))
    for host in range(2):
        of_steps = batches_of(source, host, 20)
        for first, second in zip(of_steps[::2], of_steps[1::2]):
            positions = np.concatenate([first["key_position"], second["key_position"]])
            assert sorted(positions) == list(range(8 * host, 8 * host + 8))
            groups = [set(group) for group in positions.reshape(-1, 2) // 2]
            assert not any(len(group) == 1 for group in groups)    # of the keys of two queries that share statistics


def test_the_groups_of_two_hosts_are_apart_for_any_step():
    for step in range(200):
        order = key_permutation(3, step, 8, 4).numpy()
        assert {len(set(group)) for group in (order // 4).reshape(2, 4)} == {2}


@pytest.mark.slow
def test_views_are_made_in_another_process(photos):
    """As the input pipelines of a TPU slice are, on its hosts."""
    code = f"""
import tensorflow as tf
from moco_tf.data.pipeline import UnreadableElsewhere, training_batches
from moco_tf.data.sources import open_source
from moco_tf.views.recipes import RECIPES
port = PORT
tf.config.experimental_connect_to_host(f"localhost:{{port}}", job_name="worker")
source = open_source("folder", {str(photos)!r})
with tf.device("/job:worker/replica:0/task:0/device:CPU:0"):
    batches = training_batches(source, RECIPES["quickstart"](size=8, xla=False), 16, 3, seed=1,
                               unreadable=UnreadableElsewhere(source, 0.5))
    batch = next(iter(batches))
    assert "job:worker" in batch["query"].device, batch["query"].device
print(batch["index"].numpy().tolist())
"""
    port, = free_ports(1)
    server = ("import tensorflow as tf\n"
              f"tf.distribute.Server({{'worker': ['localhost:{port}']}}, job_name='worker', task_index=0).join()")
    source = open_source("folder", str(photos))
    with processes() as start:
        start(["-c", server])
        (status, output), = ended([start(["-c", code.replace("PORT", str(port))])])
    assert status == 0, output
    here = next(iter(training_batches(source, RECIPES["quickstart"](size=8, xla=False), 16, 3, seed=1)))
    assert output.splitlines()[-1] == str(here["index"].numpy().tolist())


# ---------------------------------------------------------------------------------------------- the data service

@pytest.fixture(scope="module")
def service():
    """The address of a dispatcher with two workers, in one process of their own."""
    code = """
import threading
import tensorflow as tf
parts = tf.data.experimental.service
dispatcher = parts.DispatchServer()
workers = [parts.WorkerServer(parts.WorkerConfig(dispatcher.target.split("://")[1])) for _ in range(2)]
print(dispatcher.target, flush=True)
threading.Event().wait()
"""
    with processes() as start:
        yield next(line.strip() for line in start(["-c", code]).stdout if line.startswith("grpc://"))


def test_a_service_gives_each_share_of_a_batch_once_to_one_of_the_hosts(photos, service):
    source, recipe, steps = open_source("folder", str(photos)), RECIPES["quickstart"](size=8, xla=False), 30

    def in_turn(made, steps):
        of_hosts = [iter(training_batches(source, recipe, 16, 3, seed=1, bn_group_size=2, service=made,
                                          context=tf.distribute.InputContext(2, host, 2))) for host in range(2)]
        return [next(batches) for _ in range(steps) for batches in of_hosts]

    number = {bytes(batch["query"].numpy()): i for i, batch in enumerate(in_turn(None, 2 * steps))}
    served = in_turn(DataService(service, "test"), steps)
    got = [number[bytes(batch["query"].numpy())] for batch in served]
    assert len(set(got)) == 2 * steps    # none twice
    assert set(got) >= set(range(steps))    # none left out; the last ones may still be on their way
    for host, batch in enumerate(served[:2]):
        assert sorted(batch["key_position"].numpy()) == list(range(8 * host, 8 * host + 8))


def test_a_service_gives_each_record_once_an_epoch(photos, tmp_path, service):
    pack(str(photos), str(tmp_path / "packed"), shards=5)
    source = open_source("records", str(tmp_path / "packed"))
    batches = training_batches(source, RECIPES["quickstart"](size=8, xla=False), 10, 5, seed=1, bn_group_size=2,
                               service=DataService(service, "records"))
    seen = np.bincount(np.concatenate([batch["index"].numpy() for batch in batches.take(100)]))    # of 20 epochs
    assert len(seen) == 50 and seen.sum() == 1000
    assert seen.min() >= 16 and seen.max() <= 24    # but for what is still, or already, on its way


def test_what_a_service_cannot_do_is_said(photos, tmp_path, service):
    with pytest.raises(UsageError, match="grpc://HOST:PORT"):
        DataService("localhost", "job")
    done = moco_tf("data", "serve", "--role=worker", "--port=1")
    assert done.returncode == 2 and "--dispatcher" in done.stderr
    np.save(tmp_path / "train.npy", np.zeros((600, 28, 28, 3), np.uint8))
    done = moco_tf("pretrain", f"--workdir={tmp_path / 'run'}", *TINY, f"--data_service={service}",
                   "--config.data.name=arrays", f"--config.data.path={tmp_path / 'train.npy'}")
    assert done.returncode == 2 and "data source arrays" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_run_outlives_one_of_two_service_workers(tmp_path):
    first, *others = free_ports(3)
    with processes() as start:
        serve = ["-m", "moco_tf", "data", "serve", "--host=localhost"]
        serving = [start([*serve, "--role=dispatcher", f"--port={first}"])]
        assert "--data_service=grpc://localhost" in serving[0].stdout.readline()
        serving += [start([*serve, "--role=worker", f"--port={port}", f"--dispatcher=localhost:{first}"])
                    for port in others]
        assert all("works for" in worker.stdout.readline() for worker in serving[1:])
        run = start([*PRETRAIN, f"--workdir={tmp_path / 'run'}", f"--data_service=grpc://localhost:{first}"])
        wait_for_step(tmp_path / "run", 10, [run])
        serving[1].kill()
        (code, output), = ended([run])
        assert code == 0, output
        serving[2].terminate()
        assert ended([serving[2]])[0][0] == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 41))


# ---------------------------------------------------------------------------------------------- the end of a host

def wait_for_step(workdir, step, running):
    deadline = time.time() + QUIET
    while time.time() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if (workdir / "metrics.jsonl").read_text().count("\n") >= step:
                return
        for process in running:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {QUIET} s")


def pretrained(workdir, stop_at=0, signal_to=None):
    """Two hosts that train in a workdir; [(exit code, output)]. At a step, one of them (signal_to[0]) gets a signal."""
    with processes() as start:
        running = start_hosts(start, [*PRETRAIN, f"--workdir={workdir}"])
        if stop_at:
            wait_for_step(workdir, stop_at, running)
            running[signal_to[0]].send_signal(signal_to[1])
        return ended(running, seconds=60 if stop_at else QUIET)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an uninterrupted run of two hosts."""
    workdir = tmp_path_factory.mktemp("hosts") / "whole"
    for code, output in pretrained(workdir):
        assert code == 0, output
    return workdir


@pytest.mark.slow
def test_only_the_chief_writes(finished):
    assert [line["step"] for line in lines(finished)] == list(range(1, 41))
    assert [line["step"] for line in lines(finished, "monitor.jsonl")] == [0, 40]
    assert json.loads((finished / "results.json").read_text())["replicas"] == 2
    saved = sorted(path.name for path in (finished / "checkpoints").glob("*.index"))
    assert saved == ["step-30.index", "step-40.index"]


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_signal_to_one_host_saves_and_stops_all(finished, tmp_path, host):
    done = pretrained(tmp_path / "run", 13, (host, signal.SIGTERM))
    assert [code for code, _ in done] == [75, 75], done
    assert "SIGTERM" in done[host][1] and "another host" in done[1 - host][1]
    steps = {output.rsplit("saved at step ", 1)[1].split(";")[0] for _, output in done}
    assert len(steps) == 1 and int(steps.pop()) % StopOnSignal.ASK_EVERY == 0
    for code, output in pretrained(tmp_path / "run"):
        assert code == 0 and "resuming at step" in output, output
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_the_death_of_one_host_ends_the_other(finished, tmp_path, host):
    done = pretrained(tmp_path / "run", 13, (host, signal.SIGKILL))    # within a minute, or this fails
    assert [done[host][0], done[1 - host][0]] == [-signal.SIGKILL, 75], done
    assert "another host is gone" in done[1 - host][1].splitlines()[-1], done
    for code, output in pretrained(tmp_path / "run"):
        assert code == 0 and "resuming at step 10" in output, output
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
def test_a_host_with_another_config_is_noticed(tmp_path):
    with processes() as start:
        seeds = [f"--config.seed={index}" for index in range(2)]
        for code, output in ended(start_hosts(start, [*PRETRAIN, f"--workdir={tmp_path / 'run'}"], seeds)):
            assert code == 2 and "not the same config" in output.splitlines()[-1], output


class Pair:
    """What one of two hosts sees of the other, which always says `others`."""

    count = 2

    def __init__(self, chief, others):
        self.chief, self.others, self.asked = chief, others, 0

    def sum(self, number):
        self.asked += 1
        return number + self.others


def tiny_method():
    method = hosts.RUNS["moco_v1"]()
    method.compile(optimizer=hosts.SGD(0.1))
    method.optimizer.build(method.trainable_weights)
    return method


def test_hosts_ask_each_other_every_few_steps_only(tmp_path):
    pair = Pair(chief=True, others=0)
    stop = StopOnSignal(0, Checkpoints(tiny_method(), str(tmp_path), hosts=Pair(True, 0)), pair)
    for batch in range(12):
        stop.on_train_batch_end(batch)
    assert pair.asked == 2
    stop.received = signal.SIGTERM
    stop.on_train_batch_end(12)
    stop.on_train_batch_end(13)
    with pytest.raises(Preempted, match="SIGTERM and saved at step 15"):
        stop.on_train_batch_end(14)
    assert (tmp_path / "step-15.index").exists()


def test_all_hosts_hear_of_a_checkpoint_that_the_chief_could_not_write(tmp_path):
    checkpoints = Checkpoints(tiny_method(), str(tmp_path), hosts=Pair(chief=False, others=1))
    with pytest.raises(DataError, match="chief"):
        checkpoints.save(3)
    assert not list(tmp_path.iterdir()) and checkpoints.good is None


# ---------------------------------------------------------------------------------------------- the strategy

@pytest.mark.parametrize("text", ["{", "[]", '{"cluster": {"worker": ["a:1", "b:1"]}}',
                                  '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
                                  '{"cluster": {"ps": ["a:1"]}, "task": {"type": "ps", "index": 0}}'])
def test_a_malformed_cluster_is_a_usage_error(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(UsageError, match="TF_CONFIG must be like"):
        make_strategy()


def test_what_a_strategy_needs_is_said(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(UsageError, match="needs TF_CONFIG"):
        make_strategy("multi_worker")
    with pytest.raises(UsageError, match="A TPU must answer as 'local'"):
        make_strategy("tpu", tpu="local")
    with pytest.raises(UsageError, match="Only the strategy tpu"):
        make_strategy("default", tpu="local")
    with pytest.raises(UsageError, match="Only the strategy mirrored"):
        make_strategy("tpu", cpu_replicas=2)


def test_one_process_is_the_chief():
    strategy, reason = make_strategy()
    alone = Hosts(strategy)
    assert (alone.count, alone.chief, alone.remote_input, alone.sum(3)) == (1, True, False, 3)
    assert reason.startswith("default: ")
