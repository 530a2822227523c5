"""The step's benchmark: operations counted as algebra counts them, PyTorch's step the same step, one trace."""

import json

import numpy as np
import pytest
import tensorflow as tf

from conftest import moco_tf
from moco_tf import cli
from moco_tf import config as configs
from moco_tf.bench import parts
from moco_tf.bench.step import swept, torch_settings
from moco_tf.errors import UsageError
from moco_tf.train import build_method, normalizer, set_precision, view_recipe

TINY = {"batch_size": 4, "bn_group_size": 0, "head.hidden_dim": 6, "head.dim": 5, "method.queue_size": 10}


def tiny(backbone, size, **others):
    recipe = configs.recipe("moco_v2_r50").to_dict()
    config = configs.complete({**recipe, "backbone": backbone})
    return configs.override(config, **{**TINY, "views.size": size, **others})


def tiny_resnet(**others):
    return tiny(dict(name="resnet", depth=18, width=0.125), 32, **others)


def tiny_alexnet(**others):
    """Quicker to trace."""
    return tiny(dict(name="alexnet"), 63, **others)


def test_multiply_adds_are_those_of_the_formulas():
    images, kernel = tf.zeros((2, 8, 8, 6)), tf.Variable(tf.zeros((3, 3, 3, 4)))
    wide, rows, more = tf.Variable(tf.zeros((3, 3, 4, 2))), tf.Variable(tf.zeros((5, 7))), tf.zeros((11, 7))

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            grouped = tf.nn.conv2d(images, kernel, strides=2, padding="SAME")      # two groups of three channels
            deep = tf.nn.depthwise_conv2d(grouped, wide, [1, 1, 1, 1], "VALID")    # (2, 2, 2, 8)
            hidden = tf.reshape(deep, (2, 32))[:, :5] @ rows                       # (2, 7)
            logits = tf.einsum("nc,kc->nk", hidden, more)
            loss = tf.reduce_sum(tf.square(tf.matmul(logits[None], logits[None], transpose_a=True)))
        return tape.gradient(loss, [kernel, wide, rows])

    grouped, deep, hidden, logits, square = 2 * 4 * 4 * 4 * 27, 2 * 2 * 2 * 8 * 9, 2 * 5 * 7, 2 * 11 * 7, 11 * 11 * 2
    # The images get no gradient, and neither does `more`.
    expected = 2 * grouped + 3 * deep + 3 * hidden + 2 * logits + 3 * square
    assert parts.multiply_adds(step.get_concrete_function().outputs) == expected


def test_share_outside_products_is_of_the_time_of_all_operations():
    seconds = {"Conv2DBackpropFilter": 3.0, "Einsum": 1.0, "FusedMatMul": 2.0, "FusedBatchNormV3": 1.0, "Mul": 1.0}
    assert parts.share_outside_products(seconds) == 0.25
    assert parts.share_outside_products({}) is None


def test_a_profile_has_the_operations_that_ran():
    step = tf.function(lambda x: tf.nn.relu(x @ x))
    step(tf.ones((64, 64)))
    kinds = parts.profile(lambda: step(tf.ones((64, 64))), steps=1)
    assert any("MatMul" in kind for kind in kinds) and all(seconds >= 0 for seconds in kinds.values())


def test_sweeps_keep_the_types_of_the_recipe():
    config = tiny_resnet()
    assert [c.method.queue_size for c in swept(config, "queue_size=12,20").values()] == [12, 20]
    assert [c.jit_compile for c in swept(config, "jit_compile=false,true").values()] == [False, True]
    assert list(swept(config, "optimizer.momentum=0.5")) == ["0.5"]
    for wrong, words in (("queue=3", "queue_size"), ("name=a", "views.name"), ("batch_size=big", "batch_size"),
                         ("batch_size=", "batch_size")):
        with pytest.raises(UsageError, match=words):
            swept(config, wrong)


def test_what_has_no_equivalent_in_pytorch_is_refused():
    with pytest.raises(UsageError, match="method.name moco"):
        torch_settings(configs.load("moco_v3_vit_small"))
    with pytest.raises(UsageError, match="bn_group_size"):
        torch_settings(tiny_resnet(bn_group_size=2))


def test_wrong_calls_are_answered(capsys):
    assert cli.main(["bench"]) == 2 and "step" in capsys.readouterr().err
    assert cli.main(["bench", "stop"]) == 2 and "step" in capsys.readouterr().err
    assert cli.main(["bench", "step", "--help"]) == 0 and "--sweep" in capsys.readouterr().out


# Keras has the first of several steps before its loop over the others.
@pytest.mark.parametrize("at_once, traces", [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_run_traces_its_step_once(at_once, traces):
    config = tiny_alexnet(steps_per_execution=at_once)
    method = build_method(config, 10, normalizer(view_recipe(config)))
    traced, step = [], method.train_step

    def counted(views):
        traced.append(sorted(views))
        return step(views)

    method.train_step = counted
    method.fit(parts.made_up(config, 10, 1), steps_per_epoch=6, epochs=2, verbose=0)
    assert len(traced) == traces
    assert method.optimizer.iterations.numpy() == 12


def test_a_turn_has_the_whole_step_and_its_parts():
    turns = parts.training_step(configs.to_json(tiny_alexnet()), dict(name="default"), steps=2)
    facts, turn = next(turns), next(turns)
    assert turn.units == 2 and turn.product.wall_s > 0
    assert list(turn.parts) == ["views", "keys", "EMA", "queries, forward and back", "logits, loss, gradient",
                                "optimizer", "memory"]
    assert all(part.units >= 1 and part.wall_s > 0 for part in turn.parts.values())
    assert 0 < parts.share_outside_products(turn.operations) < 1
    assert facts["steps"] == 2 and facts["multiply_adds"] > 0


@pytest.mark.torch
def test_pytorchs_step_is_ours():
    """Three steps from the same weights on the same images: losses, weights, statistics and queue, in float64."""
    import torch

    from moco_tf.bench import torch_step
    from moco_tf.export.torch_weights import checkpoint_of, official

    def exported(method):
        return {name[len("module."):]: value for name, value in official(checkpoint_of(method)).items()}

    config = tiny_resnet(precision="float64")
    set_precision("float64")
    try:
        method = build_method(config, 10 ** 6, normalizer(view_recipe(config)))    # far from the end of a cosine
        settings = torch_settings(tiny_resnet())
        model = torch_step.MoCo(torch_step.ResNet(**settings["encoder"]), **settings["moco"]).double().train()
        model.load_state_dict({name: torch.tensor(value) for name, value in exported(method).items()})
        optimizer = torch.optim.SGD(model.encoder_q.parameters(), **settings["optimizer"])
        step, random = tf.function(method.train_step), np.random.default_rng(0)
        for _ in range(3):
            query, key = random.normal(size=(2, 4, 32, 32, 3))
            ours = step({"query": query, "key": key, "key_position": tf.range(4)})
            theirs, rank = model.step(*(torch.tensor(view.transpose(0, 3, 1, 2)) for view in (query, key)), optimizer)
            np.testing.assert_allclose(ours["loss"], theirs.item(), rtol=1e-9)
            np.testing.assert_allclose(ours["accuracy"], np.mean(rank.numpy() < 1))
        state = model.state_dict()
        for name, value in exported(method).items():
            np.testing.assert_allclose(value, state[name].numpy(), rtol=1e-6, atol=1e-8, err_msg=name)
    finally:
        set_precision("float32")


@pytest.mark.slow
@pytest.mark.torch
def test_the_command_reports_a_sweep_beside_pytorch(tmp_path):
    done = moco_tf("bench", "step", "--config=moco_v2_r50", "--config.backbone.depth=18", "--config.views.size=32",
                   "--config.batch_size=4", "--config.head.hidden_dim=16", "--sweep=queue_size=64,128", "--vs=torch",
                   "--rounds=1", "--steps=1", f"--json={tmp_path / 'step.json'}", f"--plot={tmp_path / 'step.png'}")
    assert done.returncode == 0, done.stderr
    assert "queue_size" in done.stdout and "PyTorch" in done.stdout
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["onednn"] == "1"
    fewer, more = (report["results"][size] for size in ("64", "128"))
    # A key more costs a product with each query, and another for the gradient.
    assert more["operations"] - fewer["operations"] == 2 * 2 * 4 * 64 * 128
    assert 0 < fewer["torch"]["outside_products"] < 1
    assert fewer["torch"]["times_ours"] > 0 and (tmp_path / "step.png").stat().st_size > 1000
