"""Configs: completed, overridden, compared; every recipe builds."""

import contextlib

import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.evaluation.classifier import CLASSIFIERS
from moco_tf.train import (build_encoder, build_method, build_optimizer, build_schedule, check, compile_method, construct,
                           learning_rate, view_names)

keras = tf.keras

# Parameters that train: the query encoder's (torchvision's counts plus the head's), of MoCo v3 also the predictor's.
PARAMETERS = {
    "moco_v1_r50": 23_770_304, "moco_v2_r50": 27_966_656, "moco_v1_r50_w2": 94_431_488, "moco_v1_r50_w4": 376_426_880,
    "moco_v1_rx50": 46_235_072, "moco_v2_r18_cifar10": 11_234_496, "moco_v3_r50": 35_058_752,
    "moco_v3_vit_small": 42_815_104, "moco_v3_vit_base": 108_150_016, "moco_v3_vit_conv_small": 42_062_128,
    "moco_v3_vit_conv_base": 105_141_856, "cmc_alexnet": 29_687_760, "cmc_r50_v1": 12_058_048, "cmc_r50_v2": 47_531_200}
PRETRAINING = sorted(name for name in configs.recipes() if "head" in configs.load(name))
LABELLED = sorted(set(configs.recipes()) - set(PRETRAINING))


SIZES = {"bank_size": 70_000, "num_images": 70_000}    # a run counts its images


def load(name):
    """The config of a recipe as a run completes it; banks small."""
    config = configs.load(name)
    given = {f"method.{key}": count for key, count in SIZES.items() if config.method.get(key) == 0}
    return configs.override(config, **given)


def networks():
    """{name: config} of recipes with a network of their own; the others build one of these again."""
    first = {}
    for name in sorted(PRETRAINING, key=lambda name: (name not in PARAMETERS, name)):
        config = configs.load(name)
        first.setdefault(str([config.backbone, config.head, config.get("predictor"), config.views.size, config.branches]),
                         name)
    return sorted(first.values())


LARGE = ("moco_v1_r50_w2", "moco_v1_r50_w4", "cmc_r50_v2", "cmc_r50_v3", "cmc_r101_v3")    # minutes


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in networks()])
def test_every_network_of_the_recipes_builds(name):
    config = load(name)
    # In a graph variables take no memory; none of the large ones trains more than the encoder.
    with tf.Graph().as_default() if name in LARGE else contextlib.nullcontext():
        trained = build_encoder(config) if name in LARGE else build_method(config, steps_per_epoch=100)
        count = sum(variable.shape.num_elements() for variable in trained.trainable_weights)
    assert count == PARAMETERS.get(name, count)
    del trained
    keras.backend.clear_session()


def test_the_counted_networks_are_all_built():
    assert set(PARAMETERS) <= set(networks())


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_pretraining_recipe_fits_its_method(name):
    config = configs.load(name)
    check(config, size=1 << 20, replicas=1, view_names=view_names(config))
    assert build_schedule(config, 100)(0) >= 0 and build_optimizer(config, 100)


@pytest.mark.parametrize("name", LABELLED)
def test_a_recipe_for_labels_builds_on_a_backbone(name):
    config = configs.override(configs.load(name), **{"views.size": 16, "encoder": "random:smoke"})
    check(config, size=1 << 20, replicas=1, view_names=("image",))
    backbone = keras.Sequential([keras.layers.Flatten(input_shape=(16, 16, 3))])
    method = construct(CLASSIFIERS, config.method, "method", backbone=backbone, num_classes=3, seed=0)
    method.build_on(768)
    excluded = () if "exclude" not in config.optimizer else ("bias",)
    if excluded:
        config = configs.override(config, **{"optimizer.exclude": excluded})
    compile_method(method, config, steps_per_epoch=10)
    assert len(method.trainable_weights) == 2


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


def test_a_bank_of_another_size_than_the_data_is_refused():
    config = configs.override(configs.load("insdis_r50"), **{"method.bank_size": 500})
    check(config, size=500, replicas=1, view_names=("query",))
    with pytest.raises(UsageError, match="Received: 500, and 1000 training images"):
        check(config, size=1000, replicas=1, view_names=("query",))
