"""Whole runs of the command: what they leave, and that a stopped run ends as one that was not."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from conftest import ROOT, TINY, moco_tf
from runs import assert_same_run, final_state, lines, start_and_stop_at

WHOLE = [*TINY, "--config.epochs=1", "--config.checkpoint.every_steps=10"]    # 40 steps


def pretrain(workdir, *arguments, **options):
    return moco_tf("pretrain", f"--workdir={workdir}", *WHOLE, *arguments, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, process) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    done = pretrain(workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_a_run_leaves_its_config_metrics_pictures_and_results(finished):
    workdir, done = finished
    results = json.loads((workdir / "results.json").read_text())
    for key in ("knn_top1_initial", "knn_top1_final", "view_retrieval_initial", "view_retrieval_final"):
        assert 0 <= results[key] <= 1
    assert results["steps"] == 40 and results["images_per_s"] > 0 and results["seconds"] > 0
    assert set(results["versions"]) >= {"tensorflow", "python", "moco_tf"} and len(results["config_hash"]) == 12
    metrics = lines(workdir)
    assert [line["step"] for line in metrics] == list(range(1, 41))    # smoke logs every step
    assert all(np.isfinite(line["loss"]) for line in metrics)
    assert (workdir / "views.png").read_bytes()[:4] == b"\x89PNG"
    assert "kNN accuracy" in done.stdout and "view retrieval" in done.stdout and "ETA" in done.stdout
    assert sorted(p.name for p in (workdir / "checkpoints").glob("step-*.index")) == ["step-30.index", "step-40.index"]


def test_a_finished_run_is_not_trained_again(finished):
    before = (finished[0] / "metrics.jsonl").read_text()
    results = (finished[0] / "results.json").read_text()
    again = pretrain(finished[0])
    assert again.returncode == 0, again.stderr
    assert (finished[0] / "metrics.jsonl").read_text() == before
    assert json.loads(results)["images_per_s"] == json.loads((finished[0] / "results.json").read_text())["images_per_s"]


def test_a_run_whose_step_finishes_the_views_is_the_same(finished, tmp_path):
    done = pretrain(tmp_path / "run", "--config.data.device_views=true")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", finished[0])


def test_a_killed_run_ends_as_one_that_was_not(finished, tmp_path):
    code, _ = start_and_stop_at(15, ["pretrain", *WHOLE], tmp_path / "run", signal.SIGKILL)
    assert code == -signal.SIGKILL
    # What a kill in the middle of a line or of a save may leave behind.
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "lo')
    done = pretrain(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same_run(tmp_path / "run", finished[0])


def test_a_terminated_run_saves_itself_and_ends_as_one_that_was_not(finished, tmp_path):
    code, output = start_and_stop_at(13, ["pretrain", *WHOLE], tmp_path / "run", signal.SIGTERM)
    assert code == 75, output
    assert "SIGTERM" in output and "saved at step" in output
    done = pretrain(tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    [], ["--config.method.shard_bank=true", "--strategy=mirrored", "--cpu_replicas=2"]])
def test_a_killed_run_with_memory_banks_ends_as_one_that_was_not(tmp_path, options):
    """Banks, Z and negatives: bit for bit, on two replicas with a shard each too."""
    arguments = [f"--config={ROOT / 'tests/bank_config.py'}", *options]
    code, output = start_and_stop_at(17, ["pretrain", *arguments], tmp_path / "run", signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    for name in ("run", "whole"):
        done = moco_tf("pretrain", f"--workdir={tmp_path / name}", *arguments)
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    state = final_state(tmp_path / "whole")
    assert sum("banks" in name and value.shape[1:] == (16,) for name, value in state.items()) == 2
    assert sum("partition" in name for name in state) == 2


def copy_of(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    return workdir


@pytest.mark.parametrize("damage", ["truncated", pytest.param("zeros", marks=pytest.mark.slow)])
def test_a_broken_newest_checkpoint_is_found_and_the_one_before_is_used(finished, tmp_path, damage):
    workdir = copy_of(finished, tmp_path)
    data = workdir / "checkpoints" / "step-40.data-00000-of-00001"
    size = data.stat().st_size
    data.write_bytes(data.read_bytes()[:size // 2] if damage == "truncated" else bytes(size))
    done = pretrain(workdir)
    assert done.returncode == 0, done.stderr
    assert "step-40" in done.stderr and "resuming at step 30" in done.stdout
    assert_same_run(workdir, finished[0])


@pytest.mark.slow
def test_a_broken_last_checkpoint_is_written_again(tmp_path):
    workdir = tmp_path / "run"
    often = "--config.checkpoint.every_steps=15"    # 40 steps: the last checkpoint is not one of these
    assert pretrain(workdir, often).returncode == 0
    state = final_state(workdir)
    data = workdir / "checkpoints" / "step-40.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:1000])
    done = pretrain(workdir, often)
    assert done.returncode == 0 and "resuming at step 30" in done.stdout, done.stderr
    for name, value in final_state(workdir).items():
        assert "save_counter" in name or np.asarray(value).tobytes() == np.asarray(state[name]).tobytes(), name


@pytest.mark.slow
def test_two_replicas_resume_bit_for_bit(tmp_path):
    replicas = ["--strategy=mirrored", "--cpu_replicas=2", "--config.bn_group_size=25"]
    for name in ("whole", "stopped"):
        done = pretrain(tmp_path / name, *replicas)
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "stopped" / "checkpoints").glob("step-40.*"):
        path.unlink()
    done = pretrain(tmp_path / "stopped", *replicas)
    assert done.returncode == 0 and "resuming at step 30" in done.stdout, done.stderr
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_changed_data_are_noticed(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    (workdir / "data.json").write_text('{"images": 9999}')
    done = pretrain(workdir)
    assert done.returncode == 3 and "9999" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_run_that_has_not_begun_takes_a_corrected_config(finished, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    shutil.copy(finished[0] / "config.json", workdir)
    done = pretrain(workdir, "--config.method.temperature=0.5")
    assert done.returncode == 0, done.stderr


def test_no_readable_checkpoint_is_said(finished, tmp_path):
    workdir = copy_of(finished, tmp_path)
    for data in (workdir / "checkpoints").glob("*.data*"):
        data.write_bytes(b"")
    done = pretrain(workdir)
    assert done.returncode == 3 and "readable" in done.stderr.splitlines()[-1]


def test_another_config_is_refused_with_the_keys(finished):
    done = pretrain(finished[0], "--config.method.temperature=0.5")
    assert done.returncode == 2
    assert "method.temperature: stored 0.2, given 0.5" in done.stderr.splitlines()[-1]


def test_a_workdir_alone_names_its_run(finished):
    done = moco_tf("pretrain", f"--workdir={finished[0]}")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_knn_command_agrees_with_the_monitor(tmp_path):
    workdir = tmp_path / "run"
    done = pretrain(workdir, "--config.monitor.bank=10000", "--config.monitor.queries=2000", "--config.data.workers=2")
    assert done.returncode == 0, done.stderr
    measured = json.loads((workdir / "results.json").read_text())["knn_top1_final"]
    done = moco_tf("knn", f"--workdir={workdir}", "--k=20", "--temperature=0.1")
    assert done.returncode == 0, done.stderr
    assert f"k   20  temperature 0.1    top-1 {measured:.2%}" in done.stdout


def test_divergence_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    done = pretrain(tmp_path / "run", "--config.optimizer.lr_per_256=1e30", "--config.max_bad_steps=3",
                    "--config.checkpoint.every_steps=1")
    assert done.returncode == 4, done.stderr
    assert "checkpoints/step-" in done.stderr.splitlines()[-1] and "3 non-finite steps in a row" in done.stderr


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """RLIMIT_FSIZE stands in for the full disk: writes beyond it fail as they do there."""
    import resource

    workdir = tmp_path / "run"
    done = pretrain(workdir, "--config.checkpoint.every_steps=39")
    assert done.returncode == 0, done.stderr
    saved = {path.name: path.read_bytes() for path in (workdir / "checkpoints").glob("step-39*")}
    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    for path in (workdir / "checkpoints").glob("step-40*"):
        path.unlink()
    limit = sum(map(len, saved.values())) // 2
    full = subprocess.run(
        [sys.executable, "-m", "moco_tf", "pretrain", f"--workdir={workdir}"], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), timeout=300)
    assert full.returncode == 3, full.stderr
    assert "step-39" in full.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in (workdir / "checkpoints").glob("step-39*")} == saved
    assert not list((workdir / "checkpoints").glob("step-40*"))
    assert moco_tf("pretrain", f"--workdir={workdir}").returncode == 0


@pytest.mark.parametrize("images", [pytest.param("flat", marks=pytest.mark.slow), "classes"])
def test_a_folder_trains_without_and_with_labels_and_lists_what_it_cannot_read(images, tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for i in range(300):
        where = folder / (f"class{i % 3}" if images == "classes" else "")
        where.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 20 + i % 9, 3), np.uint8)).save(where / f"{i:03d}.jpg")
    broken = sorted(folder.rglob("*.jpg"))[10:300:100]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    done = moco_tf("pretrain", f"--workdir={tmp_path / 'run'}", *TINY, "--config.batch_size=50",
                   "--config.bn_group_size=25", "--config.epochs=3", "--config.data.name=folder",
                   f"--config.data.path={folder}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["view_retrieval_final"] is not None
    assert (results["knn_top1_final"] is None) == (images == "flat")
    assert all(str(path) in done.stderr for path in broken), done.stderr
