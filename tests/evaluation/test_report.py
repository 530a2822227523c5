"""kNN reports: against scikit-learn's votes, from the command line, and what is refused with one clear line."""

import json
import os
import shutil

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from conftest import moco_tf
from moco_tf import config as configs
from moco_tf.callbacks import Checkpoints
from moco_tf.data import tools
from moco_tf.errors import DataError, UsageError
from moco_tf.evaluation.report import knn_report
from moco_tf.evaluation.splits import cached_splits, check_labels, labelled_splits
from moco_tf.train import build_method, open_workdir

from tiny import config_of, tiny_encoder, write_splits


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Not to be changed."""
    return write_splits(tmp_path_factory.mktemp("images"))


@pytest.mark.parametrize("features", ["backbone", "embedding"])
def test_accuracies_are_those_of_scikit_learns_votes(features, images, tmp_path):
    encoder, config = tiny_encoder(), config_of(images)
    report = knn_report(encoder, config, (1, 15, 500), (0.07, 0.5), features, str(tmp_path))
    bank, queries = cached_splits(encoder, config, features, str(tmp_path))
    assert (report["bank"], report["queries"], report["dim"]) == (120, 60, bank.dim)
    assert [(row["k"], row["temperature"]) for row in report["grid"]] == [
        (1, 0.07), (1, 0.5), (15, 0.07), (15, 0.5), (500, 0.07), (500, 0.5)]
    for row in report["grid"]:
        votes = KNeighborsClassifier(min(row["k"], 120), metric="cosine", algorithm="brute",
                                     weights=lambda distance: np.exp((1 - distance) / row["temperature"]))
        assert row["top1"] == pytest.approx(votes.fit(bank.all(), bank.labels).score(queries.all(), queries.labels))


def test_the_encoders_that_are_no_runs_leave_no_features_behind(images, monkeypatch):
    folders = []
    monkeypatch.setattr("atexit.register", lambda *call, **options: folders.append((*call, options)))
    knn_report(tiny_encoder(), config_of(images))
    (remove, folder, options), = folders
    assert len(os.listdir(folder)) == 2
    remove(folder, **options)
    assert not os.path.exists(folder)


def test_votes_too_large_for_float32_are_refused(images):
    with pytest.raises(UsageError, match="temperatures above 0.0113"):
        knn_report(tiny_encoder(), config_of(images), temperatures=(0.1, 0.01))


def test_data_that_give_no_accuracy_are_refused(images, tmp_path):
    flat, other, alone = tmp_path / "flat", tmp_path / "other", tmp_path / "alone"
    shutil.copytree(images / "train" / "class0", flat)
    shutil.copytree(images, other)
    (other / "val" / "class1").rename(other / "val" / "class9")
    shutil.copytree(images / "train", alone / "train")
    nothing = {"data.holdout": 0.0}
    for folder, values, words in [(flat, {}, "labels"), (other, {}, "class9"), (alone, nothing, "eval_split")]:
        with pytest.raises(DataError, match=words):
            labelled_splits(config_of(folder, **values))


def test_labels_out_of_range_are_refused(images, tmp_path):
    for split in ("train", "val"):
        tools.pack(str(images), str(tmp_path / "records"), split)
        facts = json.loads((tmp_path / "records" / f"{split}.json").read_text())
        facts["class_names"].pop()
        (tmp_path / "records" / f"{split}.json").write_text(json.dumps(facts))
    config = config_of(tmp_path / "records", **{"data.name": "records"})
    with pytest.raises(DataError, match=r"0 .. 1.*Received: 2 for .*records/train.*40 such"):
        cached_splits(tiny_encoder(), config, "backbone", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="Received: -1 for image 1; 1 such"):
        check_labels(np.array([0, -1, 1]), 2, lambda row: f"image {row}")


def test_the_command_reports_and_writes_them_down(tmp_path):
    config = configs.override(configs.load("smoke"), **{"views.size": 8})
    run = str(tmp_path / "run")
    open_workdir(config, run)
    Checkpoints(build_method(config, 1), f"{run}/checkpoints").save(0)
    done = moco_tf("knn", f"--workdir={run}", "--k=20", "--temperature=0.07,0.1")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "knn.json").read_text())
    assert report["step"] == 0 and report["bank"] == 10_000 and report["queries"] == 2_000
    for row in report["grid"]:
        assert f"top-1 {row['top1']:.2%}" in done.stdout and row["top5"] > row["top1"] > 0.2
    again = moco_tf("knn", f"--encoder={run}", "--k=20", f"--workdir={tmp_path / 'elsewhere'}")
    assert again.returncode == 0 and "through the encoder" in done.stderr and "through the encoder" not in again.stderr
    assert json.loads((tmp_path / "elsewhere" / "knn.json").read_text())["grid"] == report["grid"]
    neither = moco_tf("knn", "--k=20")
    assert neither.returncode == 2 and "--encoder" in neither.stderr
