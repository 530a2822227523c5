"""Trajectories under a learning rate that changes: every run of kind `optimizer` whose optimizer exists here."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.optim.adamw import AdamW
from moco_tf.optim.lars import LARS
from moco_tf.optim.sgd import SGD

from . import replay, weights


def sgd(rules, lr):
    return SGD(lr, momentum=rules["momentum"], weight_decay=rules["weight_decay"], nesterov=rules["nesterov"])


def lars(rules, lr):
    return LARS(lr, momentum=rules["momentum"], weight_decay=rules["weight_decay"], trust=rules["trust_coefficient"])


def adamw(rules, lr):
    beta_1, beta_2 = rules["betas"]
    return AdamW(lr, weight_decay=rules["weight_decay"], beta_1=beta_1, beta_2=beta_2, epsilon=rules["eps"])


def adam(rules, lr):
    """AdamW without decay; a run whose decay is in the gradient hands it in so."""
    return adamw({**rules, "weight_decay": 0.0}, lr)


OPTIMIZERS = {"sgd": sgd, "lars": lars, "adamw": adamw, "adam": adam}


@pytest.mark.parametrize(**replay.cases("optimizer", lambda settings: settings["optimizer"]["name"] in OPTIMIZERS))
def test_optimizer(run, tag):
    settings = run.settings
    dtype = replay.DTYPES[tag]
    with replay.precision(tag):
        parameters = {}
        for name, about in settings["parameters"].items():
            start = about["scale"] * weights.draw(about["init"])
            parameters[name] = tf.Variable(start.astype(np.float32).astype(dtype), name=name)
        optimizer = OPTIMIZERS[settings["optimizer"]["name"]](settings["optimizer"], settings["lr"][0])
        optimizer.build(list(parameters.values()))
        # CMC's Adam has its decay in the gradient.
        coupled = settings["optimizer"]["weight_decay"] if settings["optimizer"]["name"] == "adam" else 0.0
        step_of_all = tf.function(lambda gradients: optimizer.apply_gradients(
            [(gradient + coupled * p, p) for gradient, p in zip(gradients, parameters.values())]))
        for step in range(settings["steps"]):
            optimizer.learning_rate.assign(settings["lr"][step])
            step_of_all([tf.constant(_gradient(settings, step, name).astype(dtype)) for name in parameters])
            for name, variable in parameters.items():
                replay.check(run, tag, variable, run[f"{tag}/{name}"][step], name)


def _gradient(settings, step, name):
    if any(zero["parameter"] == name and zero["step"] == step for zero in settings["zero_gradients"]):
        return np.zeros(settings["parameters"][name]["shape"], np.float32)
    rule = dict(settings["gradients"], shape=settings["parameters"][name]["shape"])
    return (settings["gradient_scale"] * weights.draw(rule, step=step, parameter=name)).astype(np.float32)
