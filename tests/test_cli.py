"""Bad input: an exit code and one clear line each, no traceback; help is quick and leaves TensorFlow alone."""

import subprocess
import sys

import pytest

from conftest import ROOT, TINY, moco_tf


@pytest.mark.parametrize("arguments, code, words", [
    (["pretrian"], 2, ["pretrain"]),
    (["pretrain", "--workdir={tmp}/run"], 2, ["--config", "recipes"]),
    (["pretrain", "--config=smoke"], 2, ["--workdir"]),
    (["pretrain", "--config=moco_v2_r5", "--workdir={tmp}/run"], 2, ["moco_v2_r50"]),
    (["pretrain", "--config=smoke", "--workdir={tmp}/run", "--config.bach_size=8"], 2, ["bach_size", "batch_size"]),
    (["pretrain", "--config=smoke", "--workdir={tmp}/run", "--config.method.temprature=8"], 2, ["method.temperature"]),
    (["pretrain", "--config=smoke", "--workdir={tmp}/run", "--config.batch_size=many"], 2, ["batch_size", "many"]),
    (["pretrain", "--config=smoke", "--workdir={tmp}/run", "--workdirs=x"], 2, ["workdirs", "workdir"]),
    (["pretrain", "--config=smoke", "--workdir={tmp}/run", "stray"], 2, ["stray"]),
    (["recipes", "nosuch"], 2, ["nosuch"]),
    (["data", "chekc", "{tmp}"], 2, ["check"]),
    (["knn", "--config=smoke", "--workdir={tmp}", "--k=0"], 2, ["--k"])])
def test_wrong_calls_are_answered_before_tensorflow_is_imported(arguments, code, words, tmp_path):
    check(arguments, code, words, tmp_path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, code, words", [
    (["--config.data.name=folder", "--config.data.path={tmp}/missing"], 3, ["missing"]),
    (["--config.data.name=folder", "--config.data.path={tmp}/empty"], 3, [".jpg", "empty"]),
    (["--config.data.name=foldr"], 2, ["folder"]),
    (["--config.batch_size=10001"], 2, ["10001", "10000"]),
    (["--config.batch_size=250", "--cpu_replicas=4"], 2, ["250", "4", "248"]),
    (["--config.method.queue_size=100"], 2, ["queue_size 100", "batch_size 250"]),
    (["--config.bn_group_size=60"], 2, ["bn_group_size 60", "250"]),
    (["--config.shuffle_bn=yes"], 2, ["cross_replica"]),
    (["--config.precision=float8"], 2, ["bfloat16"]),
    (["--config.views.name=moco_v9"], 2, ["moco_v2"]),
    (["--config.backbone.depth=19"], 2, ["50"]),
    (["--config.schedule.name=steps", "--config.schedule.name=cosine"], 2, ["half_cosine"]),
    (["--config.head.name=linear"], 2, ["hidden_dim"]),
    (["--config.monitor.features=pixels"], 2, ["embedding"]),
    (["--config.max_bad_steps=0"], 2, ["max_bad_steps"]),
    (["--config.jit_compile=true", "--cpu_replicas=2"], 2, ["jit_compile"]),
    (["--config.method.name=simclr"], 2, ["moco"])])
def test_what_cannot_work_is_refused_before_training(arguments, code, words, tmp_path):
    (tmp_path / "empty").mkdir()
    check(["pretrain", "--workdir={tmp}/run", *TINY, *arguments], code, words, tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    check(["pretrain", "--workdir=/proc/run", *TINY], 2, ["/proc/run"], tmp_path)
    (tmp_path / "file").write_text("")
    check(["pretrain", "--workdir={tmp}/file/run", *TINY], 2, ["file/run"], tmp_path)


def test_a_workdir_without_a_run_is_refused(tmp_path):
    check(["knn", "--config=smoke", f"--workdir={tmp_path}"], 2, ["config.json"], tmp_path)


def check(arguments, code, words, tmp_path):
    done = moco_tf(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("moco-tf: ")
    assert all(word in last for word in words), last


def test_data_check_lists_truncated_files_and_ends_with_3(tmp_path):
    import numpy as np
    from PIL import Image

    for i in range(12):
        Image.fromarray(np.full((16, 16, 3), i * 20, np.uint8)).save(tmp_path / f"{i}.jpg")
    assert moco_tf("data", "check", tmp_path).returncode == 0
    broken = tmp_path / "5.jpg"
    broken.write_bytes(broken.read_bytes()[:150])
    done = moco_tf("data", "check", tmp_path)
    assert done.returncode == 3 and broken.name in done.stdout and "Traceback" not in done.stderr


def test_data_pack_writes_records_that_train(tmp_path):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    packed = moco_tf("data", "pack", tmp_path / "images", tmp_path / "records", "--shards=2")
    assert packed.returncode == 0, packed.stderr
    again = moco_tf("data", "pack", tmp_path / "images", tmp_path / "records", "--shards=2")
    assert again.returncode != 0 and "overwrite" in again.stderr
    done = moco_tf("pretrain", f"--workdir={tmp_path / 'run'}", *TINY, "--config.batch_size=20", "--config.bn_group_size=10",
                   "--config.data.name=records", f"--config.data.path={tmp_path / 'records'}")
    assert done.returncode == 0, done.stderr


def test_doctor_takes_two_steps():
    done = moco_tf("doctor")
    assert done.returncode == 0, done.stderr
    assert "two training steps: fine" in done.stdout and "tensorflow 2.15" in done.stdout


def test_help_and_import_leave_tensorflow_alone():
    program = ("import sys, moco_tf, moco_tf.cli; code = moco_tf.cli.main({arguments}); "
               "assert 'tensorflow' not in sys.modules, 'TensorFlow was imported'; sys.exit(code)")
    for arguments in (["--help"], ["pretrain", "--help"], ["linear", "--help"], ["knn", "--help"], ["show", "--help"],
                      ["data", "--help"], ["recipes"], ["recipes", "moco_v2_r50"]):
        done = subprocess.run([sys.executable, "-c", program.format(arguments=arguments)], cwd=ROOT, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        assert "moco" in done.stdout
