"""What is written and said beside a step."""

import json

import pytest

from moco_tf.callbacks import Log
from moco_tf.methods import METHODS


@pytest.fixture
def log(tmp_path):
    """Of a run whose every step is logged."""
    return Log(0, total_steps=10, steps_per_epoch=5, batch_size=4, every=1, path=str(tmp_path / "metrics.jsonl"), writer=None,
               clock=None, chance=6.65, schedule=lambda step: 0.1)


def step(log, number, **values):
    log.on_train_batch_begin(number)
    log.on_train_batch_end(number, {"loss": 6.0, "accuracy": 0.5, "bad_steps": 0, **values})


def test_every_line_has_the_loss_of_chance_beside_the_loss(log):
    for number in range(3):
        step(log, number)
    lines = [json.loads(line) for line in open(log.path)]
    assert [(line["step"], line["loss"], line["chance_loss"]) for line in lines] == [(n, 6.0, 6.65) for n in (1, 2, 3)]


@pytest.mark.parametrize("name", METHODS)
def test_what_helps_against_collapse_is_of_the_method(log, name, capsys):
    """Only MoCo has a queue; banks and in-batch keys have no momentum encoder, v3 has."""
    log.model = METHODS[name]
    step(log, 0, feature_std=0.01)
    said = capsys.readouterr().out
    assert "collapse" in said and "learning rate" in said
    assert ("queue" in said, "momentum" in said) == (name == "moco", name.startswith("moco"))
