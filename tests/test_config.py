"""Configs: completed, overridden, compared; every recipe builds."""

import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.train import build_method, learning_rate, view_recipe

keras = tf.keras

# Parameters of the query encoder (torchvision's counts plus the head's), millions.
PARAMETERS = {
    "moco_v1_r50": 23_770_304, "moco_v2_r50": 27_966_656, "moco_v2_r50_800ep": 27_966_656, "moco_v1_r50_w2": 94_431_488,
    "moco_v1_r50_w4": 376_426_880, "moco_v1_rx50": 46_235_072, "moco_v2_r50_imagenet100": 27_966_656,
    "moco_v2_r18_cifar10": 11_234_496}


@pytest.mark.parametrize("name", sorted(configs.recipes()))
def test_every_recipe_builds(name):
    config = configs.load(name)
    method = build_method(config, steps_per_epoch=100)
    count = sum(int(tf.size(w)) for w in method.trainable_weights)
    assert count == PARAMETERS.get(name, count)
    assert method.queue.keys.shape == (config.method.queue_size, config.head.dim)
    assert {"query", "key"} == set(view_recipe(config).views)
    del method
    keras.backend.clear_session()


@pytest.mark.parametrize("name", sorted(configs.recipes()))
def test_every_recipe_says_what_it_is_and_how_to_run_it(name):
    text = configs.describe(configs.recipes()[name])
    assert f"--config={name}" in text and len(text.splitlines()[0]) <= 120


def test_the_papers_learning_rates_are_those_of_batch_256():
    assert learning_rate(configs.load("moco_v2_r50")) == pytest.approx(0.03)
    assert learning_rate(configs.load("moco_v2_r18_cifar10")) == pytest.approx(0.06)


def test_json_holds_the_whole_config():
    for name in configs.recipes():
        config = configs.load(name)
        again = configs.from_json(configs.to_json(config))
        assert configs.differences(config, again) == []
        assert configs.digest(config) == configs.digest(again)


def test_differences_name_the_keys():
    config = configs.load("smoke")
    other = configs.override(config, **{"method.temperature": 0.5, "epochs": 7})
    assert configs.differences(config, other) == ["epochs: stored 1, given 7", "method.temperature: stored 0.2, given 0.5"]


def test_unknown_keys_are_refused_with_the_nearest():
    with pytest.raises(UsageError, match="method.temperature"):
        configs.override(configs.load("smoke"), **{"method.temprature": 1.0})
    with pytest.raises(UsageError, match="method.temperature"):
        configs.override(configs.load("smoke"), temperature=1.0)


def test_a_file_and_a_workdirs_json_are_configs_too(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(configs.recipes()["smoke"].read_text())
    assert configs.differences(configs.load("smoke"), configs.load(str(path))) == []
    (tmp_path / "config.json").write_text(configs.to_json(configs.load("smoke")))
    assert configs.differences(configs.load("smoke"), configs.load(str(tmp_path / "config.json"))) == []
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UsageError, match="JSON"):
        configs.load(str(tmp_path / "broken.json"))
