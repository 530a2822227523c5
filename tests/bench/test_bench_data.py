"""`moco-tf bench data`: the stages are the run's own, their times add up, and the advice follows from them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.bench import data, peers
from moco_tf.data.pipeline import training_batches
from moco_tf.errors import DataError, UsageError
from moco_tf.train import open_data, view_recipe
from moco_tf.views.recipes import RECIPES

COLOUR = (200, 100, 50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty JPEG files of one colour, of different sizes."""
    path = tmp_path_factory.mktemp("photos")
    for number in range(40):
        image = tf.fill([40 + number, 60, 1], np.uint8(1)) * tf.constant(COLOUR, tf.uint8)
        tf.io.write_file(f"{path}/{number % 2}/{number}.jpg", tf.io.encode_jpeg(image, quality=100))
    return path


def config_of(folder, **others):
    return configs.override(configs.load("moco_v2_r50"), **{
        "data.name": "folder", "data.path": str(folder), "data.holdout": 0.0, "views.size": 8, **others})


def test_each_pipeline_has_a_stage_more_and_the_last_is_the_runs(folder):
    config = configs.with_option(config_of(folder), "views.xla", "False")
    source = open_data(config)[0]
    built = data.pipelines(config, source, batch_size=8)
    assert list(built) == [data.READ, data.DECODE, data.BATCHED, data.CROP, "colour", "blur", "flip"]
    batches = {name: next(iter(batches)) for name, batches in built.items()}
    sizes = {len(tf.io.read_file(source.describe(index)).numpy()) for index in range(source.size)}
    assert batches[data.READ].shape == (8,) and set(batches[data.READ].numpy()) <= sizes
    assert not batches[data.BATCHED]["query"].numpy().any()
    np.testing.assert_allclose(batches[data.CROP]["query"], np.broadcast_to(COLOUR, (8, 8, 8, 3)), atol=2)
    colours = batches["colour"]["query"].numpy().reshape(8, -1, 3)
    assert np.ptp(colours, axis=0).max() > 20 and np.ptp(colours, axis=1).max() <= 6    # of each image another
    run = next(iter(training_batches(source, view_recipe(config), 8, source.size // 8, config.seed)))
    for name, value in run.items():
        np.testing.assert_array_equal(batches["flip"][name], value)


def test_the_stages_add_up():
    cpu_ms = {data.READ: 0.5, data.DECODE: 2.0, data.BATCHED: 0.25, data.CROP: 4.0, "jitter": 6.0, "blur": 5.75}
    stages = data.stages_of(cpu_ms)
    assert stages == {data.READ: 0.5, data.CROP: 3.25, "jitter": 2.0, "blur": -0.25, "order and batch": 0.25}
    assert sum(stages.values()) == 5.75


def test_advice_counts_cores_and_names_what_helps():
    report = {"cpu_ms": 7.0, "host_ms": 3.5, "cpus": 4, "stages": {data.READ: 1.4},
              "data": {"height": 2000.0, "width": 3000.0, "bytes": 3e6},
              "config": {"data": {"name": "folder", "normalize": "step", "device_views": False},
                         "views": {"size": 224}, "method": {"name": "moco"}, "mixture": {"name": "none"}}}
    assert "1.0 cores" in data.advice(report, 100)[0] and data.advice(report, 100)[0].endswith("the data keep up")
    first, *options = data.advice(report, 1000)
    assert "takes 10.0 cores" in first and "make 400 images/s" in first and "3 such hosts" in first
    assert [option.split()[0] for option in options] == [
        "--config.data.device_views=True:", "smaller", "moco-tf", "moco-tf"]
    assert "5.0 cores" in options[0] and "256 on the shorter side" in options[1] and "6 cores" in options[3]


def test_a_report_of_a_folder(folder, tmp_path, capsys):
    config = config_of(folder, **{"views.name": "cmc", "data.normalize": "input"})
    config = configs.with_option(config, "views.xla", "False")
    report = data.bench_data(config, images=32, rounds=1, step_rates=[1e6], json_file=f"{tmp_path}/a.json",
                             plot=f"{tmp_path}/a.png")
    shown = capsys.readouterr().out
    assert report["data"]["images"] == 32 and report["data"]["width"] == 60 and report["cpu_ms"] > 0
    assert list(report["stages"]) == [data.READ, data.CROP, "flip", "normalize", "order and batch"]
    assert sum(report["stages"].values()) == pytest.approx(report["cpu_ms"])
    assert "the step waits" in shown and "the limit" in shown and "--config.data.normalize=step" in shown
    assert json.loads((tmp_path / "a.json").read_text())["stages"] == report["stages"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_report_of_images_that_are_no_files():
    report = data.bench_data(configs.load("smoke"), images=64, rounds=1)
    assert report["data"]["bytes"] == 0 and report["cpu_ms"] > 0


def test_what_cannot_be_measured_says_why(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="torchvision, albumentations"):
        data.bench_data(config_of(folder), vs=["dali"])
    with pytest.raises(UsageError, match="local folder"):
        data.bench_data(configs.load("smoke"), vs=["torchvision"])
    with pytest.raises(DataError, match="existing folder"):
        data.bench_data(config_of(tmp_path / "none"))
    monkeypatch.setitem(peers.NEEDED, "torchvision", ("no_such_module",))
    with pytest.raises(UsageError, match="pip install torch torchvision"):
        data.bench_data(config_of(folder), vs=["torchvision"])
    monkeypatch.setattr(peers, "NEEDED", dict.fromkeys(peers.PEERS, ()))
    with pytest.raises(UsageError, match="Received: quickstart"):
        data.bench_data(config_of(folder, **{"views.name": "quickstart"}), vs=["torchvision"])


def test_peers_have_the_recipes_stages_and_import_no_tensorflow():
    for name, views in peers.RECIPES.items():
        ours = [[stage.name for stage in view.stages] for view in RECIPES[name]().views.values()]
        assert [[stage for stage, *_ in view if stage != "lab"] for view in views] == ours
    subprocess.run([sys.executable, "-c", "import sys, moco_tf.bench.peers; assert 'tensorflow' not in sys.modules"],
                   check=True)


@pytest.mark.torch
def test_a_peers_rounds_are_of_whole_epochs_in_drawn_orders():
    batches = iter(peers.Endless(10, 4))
    drawn = [index for _ in range(5) for index in next(batches)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10)) and drawn[:10] != drawn[10:]
    views = peers.Views(list(range(10)), float, [lambda x: x, lambda x: x + 100.0])
    assert views[3] == [3.0, 103.0]
    turns = peers._turns(views, {"made by": "this test"}, batch_size=4, batches=3, workers=1)
    assert next(turns) == {"made by": "this test", "workers": 1} and next(turns).units == 12
