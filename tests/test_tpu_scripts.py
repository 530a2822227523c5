"""tpu_scripts/: what they ask of gcloud, with a stub in its place, and what runs on a worker, for real."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tpu_scripts"
NAMES = ("create", "setup", "launch", "watch", "resume", "copy", "delete")
WHERE = ["--name=moco", "--zone=us-west4-a"]
RUN = ["moco-tf", "pretrain", "--config=moco_v3_r50", "--workdir=gs://bucket/runs/v3"]
STATUS = "if [ -e moco_tf/job ]; then bash moco_tf/job status; else echo none; fi"
ON_ONE_HOST = "env TPU_NAME=local NEXT_PLUGGABLE_DEVICE_USE_C_API=true TF_PLUGGABLE_DEVICE_LIBRARY_PATH=/lib/libtpu.so"
ON_HOSTS = "env TPU_NAME=moco TPU_LOAD_LIBRARY=0"

# Sizes by Google's tables: v2 to v5p count cores, two to a chip and four chips to a host; v5e and v6e count chips.
TYPES = {"v2-8": ("v2-8", 4, 1), "v3-32": ("v3-32", 16, 4), "v4-8": ("v4-8", 4, 1), "v4-64": ("v4-64", 32, 8),
         "v5p-16": ("v5p-16", 8, 2), "v5e-1": ("v5litepod-1", 1, 1), "v5e-8": ("v5litepod-8", 8, 1),
         "v5e-32": ("v5litepod-32", 32, 8), "v5litepod-16": ("v5litepod-16", 16, 4), "v6e-8": ("v6e-8", 8, 1),
         "v6e-64": ("v6e-64", 64, 16)}

# Records its arguments. A state, or a job's status, is the next line of its file, the last one again and again.
GCLOUD = r"""#!/bin/bash
{ printf '%s\0' "$@"; echo; } >>"$STUB/calls"
next() {
  [[ -e $STUB/$1 ]] || { echo "$2"; return; }
  head -n 1 "$STUB/$1"
  [[ $(wc -l <"$STUB/$1") -le 1 ]] || sed -i 1d "$STUB/$1"
}
while read -r pattern; do
  if [[ -n $pattern && "$*" == *"$pattern"* ]]; then echo "ERROR: the stub fails" >&2; exit 7; fi
done < <(cat "$STUB/failing" 2>/dev/null)
case "$*" in
  *" describe "*)
    state=$(next "$3" READY)
    [[ $state != none ]] || { echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2; exit 1; }
    [[ $state != denied ]] || { echo "ERROR: (gcloud) PERMISSION_DENIED" >&2; exit 1; }
    echo "$state" ;;
  *"job status"*) next status running ;;
esac
"""

# A slice of one worker, its home a folder here: scp copies into it, ssh runs there.
HOST = r"""#!/bin/bash
{ printf '%s\0' "$@"; echo; } >>"$STUB/calls"
export HOME=$STUB/home
mkdir -p "$HOME"
case "$*" in
  *"tpu-vm describe "*) echo READY ;;
  *"queued-resources describe "*) echo ACTIVE ;;
  *" scp "*)
    for word; do [[ ! -f $word ]] || cp "$word" "$HOME/moco_tf/"; done ;;
  *" ssh "*)
    for word; do [[ $word != --command=* ]] || (cd && bash -c "${word#--command=}"); done ;;
esac
"""


class Cloud:
    """Runs the scripts with a stub of gcloud on the PATH."""

    def __init__(self, folder, stub=GCLOUD):
        self.folder = folder
        (folder / "bin").mkdir()
        self.program("gcloud", stub)
        self.env = {**os.environ, "STUB": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def program(self, name, text):
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def answer(self, **lines):
        """What describe (tpu_vm, queued_resources) and the job's status (status) say, call by call; or what fails."""
        for name, values in lines.items():
            (self.folder / name.replace("_", "-")).write_text("".join(f"{value}\n" for value in values))

    def run(self, script, *arguments):
        return self.bash([str(SCRIPTS / script), *arguments])

    def bash(self, words):
        (self.folder / "calls").unlink(missing_ok=True)
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, cwd=self.folder)

    def calls(self):
        """Of the last run, each as one line, without `gcloud` and without folders that were made for the moment."""
        calls = self.folder / "calls"
        lines = calls.read_text().split("\0\n") if calls.exists() else []
        return [re.sub(r"/\S+/(\w+\.tar\.gz)", r"\1", line.replace("\0", " ")) for line in lines if line]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def tpu(verb, rest="", kind="tpu-vm"):
    return f"compute tpus {kind} {verb} moco --zone=us-west4-a{rest and ' ' + rest}"


def queue(verb, rest=""):
    return tpu(verb, rest, kind="queued-resources")


def ssh(command, worker="0"):
    return tpu("ssh", f"--quiet --worker={worker} --command={command}")


LOOK, LOOK_QUEUE = tpu("describe", "--format=value(state)"), queue("describe", "--format=value(state.state)")
SET_UP = [ssh("mkdir -p moco_tf", "all"),
          f"compute tpus tpu-vm scp {SCRIPTS}/worker/install {SCRIPTS}/worker/job {SCRIPTS}/worker/constraints.txt "
          "moco_tf.tar.gz moco:moco_tf/ --zone=us-west4-a --quiet --worker=all",
          ssh("bash moco_tf/install ./moco_tf.tar.gz", "all")]


def launched(environment, command=tuple(RUN)):
    return ssh(f"{environment} bash moco_tf/job start {' '.join(command)}")


def runtime(hosts):
    return "tpu-vm-tf-2.15.1-pjrt" if hosts == 1 else "tpu-vm-tf-2.15.1-pod-pjrt"


def environment(hosts):
    return ON_ONE_HOST if hosts == 1 else ON_HOSTS


# ---------------------------------------------------------------------------------------------- all scripts

def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).parent
    program = shutil.which("shellcheck", path=f"{beside}{os.pathsep}{os.environ['PATH']}")
    assert program, "shellcheck is part of the test extra: pip install -e '.[test]'"
    scripts = [path for path in SCRIPTS.rglob("*") if path.is_file()
               and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash"))]
    assert {SCRIPTS / name for name in NAMES} < set(scripts)
    found = subprocess.run([program, *map(str, scripts)], capture_output=True, text=True, cwd=SCRIPTS)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", NAMES)
def test_help_shows_an_example_and_every_flag(cloud, script):
    told = cloud.run(script, "--help")
    assert told.returncode == 0 and f"tpu_scripts/{script} --" in told.stdout and "--dry_run" in told.stdout
    assert "shellcheck" not in told.stdout and "source" not in told.stdout.split()
    own = re.search(r'^parse "(.*?)" "(.*?)"', (SCRIPTS / script).read_text(), re.MULTILINE)
    for flag in f"{own[1]} {own[2]}".split():
        assert f"--{flag}" in told.stdout, flag
    assert not cloud.calls()


@pytest.mark.parametrize("script, arguments, says", [
    ("create", ["--zone=z", "--type=v4-8"], "--name is needed"),
    ("create", ["--name=moco", "--type=v4-8"], "--zone is needed"),
    ("create", [*WHERE], "--type is a generation and a size"),
    ("create", [*WHERE, "--type=v7-8"], "Received: v7-8"),
    ("create", [*WHERE, "--type=v4-12"], "a multiple of 8 cores. Received: v4-12"),
    ("create", [*WHERE, "--type=v6e-24"], "Received: v6e-24"),
    ("create", [*WHERE, "--type=v4-8", "--spot", "--reserved"], "Received: both"),
    ("create", [*WHERE, "--type=v4-8", "--spot=yes"], "--spot is true or false"),
    ("create", [*WHERE, "--type=v4-8", "--sport"], "Received: --sport"),
    ("create", ["--name", "moco"], "Write --name=VALUE"),
    ("create", [*WHERE, "v4-8"], "Received: v4-8"),
    ("setup", ["--zone=z"], "--name is needed"),
    ("launch", [*WHERE, "--type=v4-8"], "A command follows --"),
    ("launch", [*WHERE, "--", *RUN], "--type is a generation"),
    ("launch", [*WHERE, "--type=v4-8", "--workers=3", "--", *RUN], "--workers is 0 or all"),
    ("watch", [*WHERE, "--lines=many"], "--lines is a number"),
    ("copy", ["--to=here"], "--workdir is needed"),
    ("copy", ["--workdir=runs/v3", "--to=here"], "--name is needed"),
    ("resume", [*WHERE, "--type=v4-8", "--", "moco-tf", "pretrain", "--workdir=runs/v3"], "--workdir=gs://"),
    ("delete", ["--name=moco"], "--zone is needed"),
])
def test_usage_errors_say_what_must_hold_and_run_nothing(cloud, script, arguments, says):
    told = cloud.run(script, *arguments)
    assert told.returncode == 2 and says in told.stderr and "--help" in told.stderr
    assert len(told.stderr.splitlines()) == 1 and not cloud.calls()


@pytest.mark.parametrize("kind", ["v4-8", "v5e-32", "v6e-64"])
@pytest.mark.parametrize("script, arguments, states", [
    ("create", ["--spot"], dict(queued_resources=["none", "ACTIVE"])),
    ("create", ["--plain", "--reserved", "--project=mine"], dict(tpu_vm=["none", "READY"])),
    ("setup", [], {}),
    ("launch", ["--", "moco-tf", "pretrain", "--note=it's $HOME, a \"b\" *"], {}),
    ("launch", ["--workers=all", "--", "moco-tf", "doctor"], {}),
    ("watch", ["--workdir=gs://bucket/runs/v3", "--workers=all", "--follow"], dict(queued_resources=["ACTIVE"])),
    ("copy", ["--workdir=gs://bucket/runs/v3", "--to=here", "--workers=all"], {}),
    ("delete", [], dict(queued_resources=["ACTIVE"])),
])
def test_dry_run_prints_what_is_run_fit_to_be_pasted(cloud, script, arguments, states, kind):
    before, dashes, after = list(arguments), [], []
    if "--" in arguments:
        at = arguments.index("--")
        before, dashes, after = arguments[:at], ["--"], arguments[at + 1:]
    line = [*WHERE, f"--type={kind}", *before]
    shown = cloud.run(script, *line, "--dry_run", *dashes, *after)
    assert shown.returncode == 0, shown.stderr
    assert not cloud.calls() and not (cloud.folder / "here").exists()
    cloud.answer(**states)
    assert cloud.run(script, *line, *dashes, *after).returncode == 0
    really = cloud.calls()
    commands = [text for text in shown.stdout.splitlines() if text.startswith("gcloud ")]
    cloud.bash(["bash", "-c", "\n".join(commands)])
    assert cloud.calls() == really and really


def test_gcloud_that_fails_ends_a_script_with_its_command(cloud):
    cloud.answer(failing=["scp"])
    told = cloud.run("setup", *WHERE)
    assert told.returncode == 1 and "the stub fails" in told.stderr and "exit code 7" in told.stderr
    assert "gcloud compute tpus tpu-vm scp" in told.stderr
    assert len(cloud.calls()) == 2      # mkdir, scp; nothing is installed


def test_an_error_that_is_not_absence_is_not_taken_for_it(cloud):
    cloud.answer(queued_resources=["denied"])
    told = cloud.run("create", *WHERE, "--type=v4-8")
    assert told.returncode == 1 and "PERMISSION_DENIED" in told.stderr
    assert cloud.calls() == [LOOK_QUEUE]


# ---------------------------------------------------------------------------------------------- one by one

@pytest.mark.parametrize("kind", TYPES)
def test_create_asks_for_the_slice_with_its_runtime(cloud, kind):
    accelerator, chips, hosts = TYPES[kind]
    cloud.answer(queued_resources=["none", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
    told = cloud.run("create", *WHERE, f"--type={kind}", "--spot", "--poll=0",
                     "--create_flags=--network=net --internal-ips")
    assert told.returncode == 0
    assert f"{accelerator}, {chips} chip(s) on {hosts} host(s)" in told.stderr and "PROVISIONING" in told.stderr
    assert ("not certain" in told.stderr) == kind.startswith("v6e")
    made = queue("create", f"--accelerator-type={accelerator} --node-id=moco --runtime-version={runtime(hosts)} --spot "
                 "--network=net --internal-ips")
    assert cloud.calls() == [LOOK_QUEUE, made, *3 * [LOOK_QUEUE]]


def test_create_plain_and_with_another_runtime(cloud):
    cloud.answer(tpu_vm=["none", "READY"])
    told = cloud.run("create", *WHERE, "--type=v3-8", "--plain", "--reserved", "--runtime=tpu-vm-tf-2.15.0-pjrt",
                     "--project=mine")
    assert told.returncode == 0
    assert cloud.calls() == [line.replace("us-west4-a", "us-west4-a --project=mine") for line in (
        LOOK, tpu("create", "--accelerator-type=v3-8 --version=tpu-vm-tf-2.15.0-pjrt --reserved"), LOOK)]


@pytest.mark.parametrize("states", [["ACTIVE"], ["ACCEPTED", "ACTIVE"]])
def test_create_makes_nothing_twice(cloud, states):
    cloud.answer(queued_resources=states)
    assert cloud.run("create", *WHERE, "--type=v4-8", "--poll=0").returncode == 0
    assert cloud.calls() == len(states) * [LOOK_QUEUE]


def test_create_gives_up_on_a_request_that_failed(cloud):
    cloud.answer(queued_resources=["none", "ACCEPTED", "FAILED"])
    told = cloud.run("create", *WHERE, "--type=v4-8", "--poll=0")
    assert told.returncode == 1 and "Received: FAILED" in told.stderr and "tpu_scripts/delete" in told.stderr


def test_setup_installs_this_checkout_on_all_workers(cloud):
    cloud.program("tar", '#!/bin/bash\necho "$@" >"$STUB/tar"\nexec /bin/tar "$@"\n')
    assert cloud.run("setup", *WHERE).returncode == 0
    assert cloud.calls() == SET_UP
    packed = (cloud.folder / "tar").read_text().split()
    assert packed[-5:] == ["moco_tf", "configs", "setup.py", "README.md", "LICENSE"]
    assert not pathlib.Path(packed[packed.index("-czf") + 1]).exists()      # cleared away


def test_setup_of_a_pinned_version_copies_no_checkout(cloud):
    assert cloud.run("setup", *WHERE, "--package=git+https://host/moco_tf@v1.0", "--tensorflow=https://host/a b.whl"
                     ).returncode == 0
    calls = cloud.calls()
    assert "tar.gz" not in calls[1]
    assert calls[2] == ssh("bash moco_tf/install git+https://host/moco_tf@v1.0 'https://host/a b.whl'", "all")


@pytest.mark.parametrize("kind", ["v2-8", "v4-8", "v5e-8", "v3-32", "v5e-32", "v6e-64"])
def test_launch_starts_one_process_on_worker_0(cloud, kind):
    assert cloud.run("launch", *WHERE, f"--type={kind}", "--", *RUN).returncode == 0
    assert cloud.calls() == [launched(environment(TYPES[kind][2]))]


def test_launch_on_all_workers_sends_one_command_line(cloud):
    assert cloud.run("launch", *WHERE, "--type=v5e-32", "--workers=all", "--", "moco-tf", "doctor").returncode == 0
    assert cloud.calls() == [ssh(f"{ON_HOSTS} bash moco_tf/job start moco-tf doctor", "all")]


def test_launch_keeps_the_words_of_a_command(cloud):
    words = ["moco-tf", "pretrain", "--note=it's $HOME `id`; \"x\" *\\", ""]
    assert cloud.run("launch", *WHERE, "--type=v4-8", "--", *words).returncode == 0
    line = cloud.calls()[0].split("--command=")[1].replace("bash moco_tf/job start", "printf '%s|'")
    assert subprocess.run(["bash", "-c", line], capture_output=True, text=True).stdout == "|".join(words) + "|"


def test_watch_shows_state_metrics_and_log(cloud):
    cloud.answer(queued_resources=["ACTIVE"])
    told = cloud.run("watch", *WHERE, "--workdir=gs://bucket/runs/v3/", "--lines=5")
    assert told.returncode == 0 and "moco: READY, in the queue: ACTIVE" in told.stdout
    assert cloud.calls() == [LOOK_QUEUE, LOOK, "storage cat --range=-1000 gs://bucket/runs/v3/metrics.jsonl",
                             ssh("bash moco_tf/job log 5")]


def test_watch_of_a_slice_that_is_gone_and_a_run_without_metrics(cloud):
    cloud.answer(queued_resources=["none"], tpu_vm=["none"], failing=["storage cat"])
    told = cloud.run("watch", *WHERE, "--workdir=gs://bucket/runs/v3")
    assert told.returncode == 0 and "moco: no slice, in the queue: not there" in told.stdout
    assert "no metrics yet" in told.stderr and not any(" ssh " in call for call in cloud.calls())


def test_copy_of_results_alone_needs_no_slice(cloud):
    assert cloud.run("copy", "--workdir=gs://bucket/runs/v3/", "--to=here").returncode == 0
    assert cloud.calls() == ["storage rsync --recursive gs://bucket/runs/v3 here"]
    assert (cloud.folder / "here" / "logs").is_dir()


@pytest.mark.parametrize("kind, workers", [("v4-8", 1), ("v5e-32", 8), ("v6e-64", 16)])
def test_copy_fetches_the_log_of_each_worker(cloud, kind, workers):
    told = cloud.run("copy", *WHERE, f"--type={kind}", "--workdir=runs/v3", "--to=here", "--workers=all")
    assert told.returncode == 0
    assert cloud.calls() == [
        "compute tpus tpu-vm scp --recurse moco:runs/v3/* here --zone=us-west4-a --quiet --worker=0",
        *(f"compute tpus tpu-vm scp moco:moco_tf/run.log here/logs/worker{i}.log --zone=us-west4-a --quiet --worker={i}"
          for i in range(workers))]


@pytest.mark.parametrize("queued, node, deleted", [
    ("ACTIVE", "none", [queue("delete", "--force --quiet")]),
    ("SUSPENDED", "DELETING", [queue("delete", "--force --quiet")]),
    ("none", "PREEMPTED", [tpu("delete", "--quiet")]),
    ("none", "none", []),
])
def test_delete_clears_queue_and_slice(cloud, queued, node, deleted):
    cloud.answer(queued_resources=[queued], tpu_vm=[node])
    assert cloud.run("delete", *WHERE).returncode == 0
    assert [call for call in cloud.calls() if "describe" not in call] == deleted
    assert {LOOK, LOOK_QUEUE} <= set(cloud.calls())


# ---------------------------------------------------------------------------------------------- the loop

def resume(cloud, *arguments, kind="v5e-32"):
    told = cloud.run("resume", *WHERE, f"--type={kind}", "--poll=0", *arguments, "--", *RUN)
    return told, [call for call in cloud.calls() if call not in (LOOK, LOOK_QUEUE, ssh(STATUS))]


@pytest.mark.parametrize("kind", ["v4-8", "v5e-32", "v6e-64"])
def test_resume_makes_a_slice_again_after_a_preemption(cloud, kind):
    accelerator, _, hosts = TYPES[kind]
    # the node, and the queue's entry: looked at by resume; by delete; by create
    cloud.answer(tpu_vm=["PREEMPTED", "none", "READY"], queued_resources=["SUSPENDED", "SUSPENDED", "none", "ACTIVE"],
                 status=["running", "running", "ended 0"])
    told, calls = resume(cloud, "--spot", kind=kind)
    assert told.returncode == 0, told.stderr
    assert calls == [queue("delete", "--force --quiet"),
                     queue("create", f"--accelerator-type={accelerator} --node-id=moco "
                           f"--runtime-version={runtime(hosts)} --spot"),
                     *SET_UP, launched(environment(hosts)), ssh("bash moco_tf/job log 40")]


def test_resume_from_nothing_waits_for_the_queue(cloud):
    cloud.answer(tpu_vm=["none", "READY"], queued_resources=["none", "none", "ACTIVE"], status=["ended 0"])
    told, calls = resume(cloud)
    assert told.returncode == 0
    assert calls[0].startswith("compute tpus queued-resources create") and calls[1:5] == [*SET_UP, launched(ON_HOSTS)]


def test_resume_joins_a_queue_it_stands_in(cloud):
    cloud.answer(tpu_vm=["none", "READY"], queued_resources=["ACCEPTED", "WAITING_FOR_RESOURCES", "ACTIVE"],
                 status=["ended 0"])
    told, calls = resume(cloud)
    assert told.returncode == 0 and calls[:4] == [*SET_UP, launched(ON_HOSTS)]


@pytest.mark.parametrize("queued", ["SUSPENDED", "FAILED", "ACTIVE"])
def test_resume_clears_an_entry_of_the_queue_that_brings_no_slice(cloud, queued):
    cloud.answer(tpu_vm=["none", "none", "READY"], queued_resources=[queued, queued, "none", "ACTIVE"],
                 status=["ended 0"])
    told, calls = resume(cloud)
    assert told.returncode == 0 and calls[0] == queue("delete", "--force --quiet")
    assert calls[1].startswith("compute tpus queued-resources create")


@pytest.mark.parametrize("status", ["ended 75", "lost"])
def test_resume_launches_again_what_was_preempted_and_saved(cloud, status):
    cloud.answer(status=["running", status, "running", status, "ended 0"])
    told, calls = resume(cloud, "--attempts=1")     # these count as no failure
    assert told.returncode == 0 and calls[:2] == 2 * [launched(ON_HOSTS)] and len(calls) == 3


@pytest.mark.parametrize("before", ["none", "ended 0", "ended 3", "lost"])
def test_resume_sets_up_a_slice_that_is_bare_or_has_done_something_else(cloud, before):
    cloud.answer(status=[before, "ended 0"])
    told, calls = resume(cloud)
    assert told.returncode == 0 and calls[:4] == [*SET_UP, launched(ON_HOSTS)]


@pytest.mark.parametrize("code", [0, 2, 3, 4])
@pytest.mark.parametrize("delete", [[], ["--delete"]])
def test_resume_ends_with_the_exit_code_of_a_run_that_is_over(cloud, code, delete):
    cloud.answer(status=["running", f"ended {code}"])
    told, calls = resume(cloud, *delete)
    assert told.returncode == code
    assert calls[0] == ssh("bash moco_tf/job log 40")
    assert (queue("delete", "--force --quiet") in calls) == bool(delete)
    assert not any("job start" in call for call in calls)


def test_resume_gives_up_after_so_many_crashes(cloud):
    cloud.answer(status=["running", "ended 1", "running", "ended 1", "running", "ended 137"])
    told, calls = resume(cloud, "--attempts=3")
    assert told.returncode == 1 and "exit code 137, the 3. time: given up" in told.stderr
    assert calls == [*2 * [launched(ON_HOSTS)], ssh("bash moco_tf/job log 40")]


def test_resume_gives_up_when_gcloud_keeps_failing(cloud):
    cloud.answer(tpu_vm=["denied"])
    told, calls = resume(cloud, "--attempts=3")
    assert told.returncode == 1 and told.stderr.count("PERMISSION_DENIED") == 3 and not calls


def test_resume_bears_a_worker_that_cannot_be_reached_for_a_while(cloud):
    cloud.answer(tpu_vm=["READY", "denied", "REPAIRING", "READY"], status=["running", "ended 0"])
    told, _ = resume(cloud, "--attempts=2")
    assert told.returncode == 0 and "REPAIRING" in told.stderr


def test_resume_deletes_nothing_because_of_an_error(cloud):
    cloud.answer(tpu_vm=["none"], queued_resources=["denied"])
    told, calls = resume(cloud, "--attempts=2")
    assert told.returncode == 1 and not calls


@pytest.mark.parametrize("kind", ["v4-8", "v5e-32", "v6e-64"])
def test_resume_shows_one_round_when_dry(cloud, kind):
    told = cloud.run("resume", *WHERE, f"--type={kind}", "--spot", "--dry_run", "--", *RUN)
    assert told.returncode == 0 and not cloud.calls()
    shown = [" ".join(shlex.split(line, comments=True)[1:]) for line in told.stdout.splitlines()]
    shown = [re.sub(r"/\S+/(\w+\.tar\.gz)", r"\1", line) for line in shown]
    for line in [LOOK, queue("delete", "--force --quiet"), *SET_UP, launched(environment(TYPES[kind][2])),
                 ssh(STATUS)]:
        assert line in shown


# ---------------------------------------------------------------------------------------------- on a worker

class Worker:
    """worker/job in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder / "moco_tf"
        self.folder.mkdir()
        shutil.copy(SCRIPTS / "worker" / "job", self.folder)

    def job(self, *arguments):
        return subprocess.run(["bash", str(self.folder / "job"), *arguments], capture_output=True, text=True,
                              timeout=30)

    def status(self):
        return self.job("status").stdout.strip()

    def wait_for(self, status):
        for _ in range(200):
            if self.status() == status:
                return
            time.sleep(0.05)
        raise AssertionError(f"{self.status()!r} for 10 s. Expected: {status!r}.")


@pytest.fixture
def worker(tmp_path):
    worker = Worker(tmp_path)
    yield worker
    if worker.status() == "running":
        worker.job("stop")


def test_a_job_leaves_its_exit_code_and_its_output(worker):
    assert worker.status() == "none"
    assert worker.job("start", "bash", "-c", 'echo "out $1"; echo err >&2; exit 3', "-", "a  b").returncode == 0
    worker.wait_for("ended 3")
    log = worker.job("log", "2").stdout.splitlines()
    assert log[0].endswith(": ended 3") and log[1].endswith(": out a  b") and log[2].endswith(": err")


def test_a_job_that_cannot_be_found_ends_with_127(worker):
    worker.job("start", "no-such-command")
    worker.wait_for("ended 127")


def test_one_job_at_a_time(worker):
    worker.job("start", "sleep", "30")
    assert worker.status() == "running"
    second = worker.job("start", "true")
    assert second.returncode == 1 and "one that runs" in second.stderr and worker.status() == "running"


def test_a_stopped_job_saves_and_ends_with_its_own_code(worker):
    worker.job("start", "bash", "-c",
               "trap 'sleep .3; echo saved; exit 75' TERM; echo ready; while :; do sleep .05; done")
    while not worker.job("log", "1").stdout.endswith(": ready\n"):
        time.sleep(0.02)
    assert worker.job("stop").returncode == 0
    worker.wait_for("ended 75")
    assert "saved" in worker.job("log", "5").stdout
    assert worker.job("stop").returncode == 1
    worker.job("start", "true")     # and may be started again
    worker.wait_for("ended 0")


def test_a_job_that_vanished_is_lost_whatever_came_before(worker):
    worker.job("start", "true")
    worker.wait_for("ended 0")
    worker.job("start", "bash", "-c", "echo ready; sleep 30")
    while not worker.job("log", "1").stdout.endswith(": ready\n"):
        time.sleep(0.02)
    os.killpg(int((worker.folder / "run.pid").read_text()), 9)      # as a host that restarts
    worker.wait_for("lost")


def test_install_refuses_an_image_without_tensorflow(tmp_path):
    cloud = Cloud(tmp_path)
    cloud.program("python3", '#!/bin/bash\n[[ $1 != -c ]] || exit 1\necho "Python 3.10.12"\n')
    told = cloud.bash(["bash", str(SCRIPTS / "worker" / "install"), "moco_tf==1.0"])
    assert told.returncode == 1 and "Received: Python 3.10.12, no TensorFlow" in told.stderr


PYTHON = """#!/bin/bash
echo "$@" >>"$STUB/python"
case "$*" in
  *"-m venv"*) mkdir -p env/bin; cp "$0" env/bin/python; cp "$STUB/moco-tf" env/bin/moco-tf ;;
  -c*) echo "3.10.12 2.15.1" ;;
esac
"""


def test_a_run_from_a_bare_slice_to_its_end_with_a_preemption(tmp_path):
    """resume, setup, install, launch and job together; gcloud's ssh and scp are local, moco-tf is a few lines."""
    cloud = Cloud(tmp_path, HOST)
    cloud.program("python3", PYTHON)
    moco_tf = cloud.folder / "moco-tf"
    moco_tf.write_text('#!/bin/bash\necho "$PWD $TPU_NAME ${TPU_LOAD_LIBRARY-unset}" "$@"\n'
                       '[[ -e "$STUB/saved" ]] && exit 0\ntouch "$STUB/saved"; exit 75\n')
    moco_tf.chmod(0o755)
    told = cloud.run("resume", *WHERE, "--type=v5e-32", "--poll=0.2", "--delete", "--", *RUN)
    assert told.returncode == 0, told.stderr
    log = (cloud.folder / "home" / "moco_tf" / "run.log").read_text()
    assert log.count(f"{cloud.folder}/home moco 0 pretrain --config=moco_v3_r50 --workdir=gs://bucket/runs/v3") == 2
    pip = [line for line in (cloud.folder / "python").read_text().splitlines() if "pip install" in line]
    assert pip == ["-m pip install --quiet --constraint=constraints.txt ./moco_tf.tar.gz google-api-python-client "
                   "oauth2client"]
    assert "ended 0" in told.stdout and queue("delete", "--force --quiet") in cloud.calls()
    with_package = subprocess.run(["tar", "-tzf", str(cloud.folder / "home" / "moco_tf" / "moco_tf.tar.gz")],
                                  capture_output=True, text=True).stdout.split()
    assert {"setup.py", "README.md", "LICENSE", "moco_tf/cli.py", "configs/moco_v3_r50.py"} <= set(with_package)
