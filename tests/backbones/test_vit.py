"""Vision transformers: published parameter counts, initial values, positions, the block's formula. Outputs of whole
networks: tests/golden; against a network of PyTorch: tests/export/test_torch_files.py."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from conftest import ROOT
from moco_tf.backbones import BACKBONES
from moco_tf.backbones.vit import Block, vit
from moco_tf.errors import UsageError
from moco_tf.heads import encoder, predictor, projector
from moco_tf.momentum import momentum_copy

keras = tf.keras
SMALL = dict(dim=24, depth=3, heads=3, patch=8, size=32)


def count(variables):
    return sum(variable.shape.num_elements() for variable in variables if "moving" not in variable.name)


def images(number=4, size=32, seed=0):
    return np.random.default_rng(seed).normal(size=(number, size, size, 3)).astype(np.float32)


@pytest.fixture
def policy():
    """Sets the Keras policy until the test ends."""
    yield keras.mixed_precision.set_global_policy
    keras.mixed_precision.set_global_policy("float32")


# Parameters of the backbone; with the projector; of what trains, with a frozen patch convolution and the predictor.
COUNTS = {"vit_small": (21665664, 41080704, 42815104), "vit_base": (85798656, 106786560, 108150016),
          "vit_conv_small": (20617392, 40032432, 42062128), "vit_conv_base": (82199904, 103187808, 105141856)}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    with tf.Graph().as_default():    # variables without memory
        backbone = BACKBONES[name](freeze_patch=True)
        model = encoder(backbone, lambda features: projector(features, layers=3))
        trained = count(model.trainable_variables) + count(predictor(last_bn=True).trainable_variables)
        assert (count(backbone.variables), count(model.variables), trained) == COUNTS[name]


def test_initial_values():
    values = {variable.name: variable.numpy() for variable in vit(**dict(SMALL, dim=96, depth=1, patch=16)).weights}

    def uniform(name, bound):
        assert 0.95 * bound < np.abs(values[name]).max() <= bound, name
        np.testing.assert_allclose(values[name].std(), bound / 3 ** 0.5, rtol=0.05, err_msg=name)

    uniform("patch_embed.proj/kernel:0", (6 / (3 * 16 * 16 + 96)) ** 0.5)
    uniform("blocks.0/blocks.0.attn.qkv/kernel:0", (6 / (96 + 96)) ** 0.5)    # three square matrices
    uniform("blocks.0/blocks.0.attn.proj/kernel:0", (6 / (96 + 96)) ** 0.5)
    uniform("blocks.0/blocks.0.mlp.fc1/kernel:0", (6 / (96 + 4 * 96)) ** 0.5)
    uniform("blocks.0/blocks.0.mlp.fc2/kernel:0", (6 / (96 + 4 * 96)) ** 0.5)
    assert 0 < np.abs(values["tokens/cls_token:0"]).max() < 5e-6
    for name, value in values.items():
        if "bias" in name or "beta" in name:
            assert not value.any(), name


def test_initial_values_of_the_convolutional_stem_are_pytorchs():
    model = vit(dim=96, depth=1, heads=3, stem="conv", size=32)
    fans = {0: 9 * 3, 3: 9 * 12, 6: 9 * 24, 9: 9 * 48, 12: 96}
    for position, fan in fans.items():
        for value in model.get_layer(f"patch_embed.proj.{position}").get_weights():
            assert 0.9 < np.abs(value).max() * fan ** 0.5 <= 1
    kernels = [model.get_layer(f"patch_embed.proj.{position}").kernel.shape[2:] for position in fans]
    assert kernels == [(3, 12), (12, 24), (24, 48), (48, 96), (96, 96)]


def test_positions_are_sines_and_cosines_of_row_then_column():
    layer = vit(**dict(SMALL, dim=12)).get_layer("tokens")
    table = layer.pos_embed.numpy()[0]
    assert table.shape == (1 + 4 * 4, 12) and not table[0].any()
    for row in range(4):
        for column in range(4):
            expected = [wave(place / 10000 ** (j / 3)) for place in (row, column) for wave in (math.sin, math.cos)
                        for j in range(3)]
            np.testing.assert_allclose(table[1 + 4 * row + column], expected, rtol=0, atol=1e-6)


def test_positions_learn_only_when_asked():
    def learning(**arguments):
        return {variable.name for variable in vit(**SMALL, **arguments).trainable_variables}

    assert learning(trainable_positions=True) - learning() == {"tokens/pos_embed:0"}


def test_a_frozen_patch_convolution_does_not_train_and_a_stem_always_does():
    frozen = {"patch_embed.proj/kernel:0", "patch_embed.proj/bias:0"}
    model = vit(**SMALL, freeze_patch=True)
    assert {v.name for v in vit(**SMALL).trainable_variables} - {v.name for v in model.trainable_variables} == frozen
    assert not keras.models.clone_model(model).get_layer("patch_embed.proj").trainable
    stem = dict(SMALL, patch=16, stem="conv")
    assert len(vit(**stem, freeze_patch=True).trainable_variables) == len(vit(**stem).trainable_variables)


def test_the_block_equals_its_formula(policy):
    """In NumPy, float64, head by head, with math.erf; to the last digits, where an inexact GELU would show."""
    policy("float64")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 12))
    block = Block(heads=3, mlp_ratio=2, name="b")
    block.build(x.shape)
    block.set_weights([rng.normal(size=w.shape) for w in block.get_weights()])
    (gamma1, beta1, w_qkv, b_qkv, w_proj, b_proj, gamma2, beta2, w_fc1, b_fc1, w_fc2, b_fc2) = [
        w for layer in (block.norm1, block.qkv, block.proj, block.norm2, block.fc1, block.fc2)
        for w in layer.get_weights()]

    def norm(v, gamma, beta):
        return (v - v.mean()) / np.sqrt(v.var() + 1e-6) * gamma + beta

    expected = np.zeros_like(x)
    for image in range(2):
        rows = np.array([norm(v, gamma1, beta1) for v in x[image]]) @ w_qkv + b_qkv
        attended = []
        for head in range(3):
            q, k, v = (rows[:, part * 12 + head * 4:part * 12 + (head + 1) * 4] for part in range(3))
            weights = np.exp(q @ k.T / np.sqrt(4))
            attended.append(weights / weights.sum(axis=1, keepdims=True) @ v)
        y = x[image] + np.concatenate(attended, axis=1) @ w_proj + b_proj
        hidden = np.array([norm(v, gamma2, beta2) for v in y]) @ w_fc1 + b_fc1
        hidden = np.vectorize(lambda v: 0.5 * v * (1 + math.erf(v / math.sqrt(2))))(hidden)
        expected[image] = y + hidden @ w_fc2 + b_fc2
    np.testing.assert_allclose(block(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("arguments, tokens", [
    (dict(patch=4, size=32), 64), (dict(patch=16, size=64), 16), (dict(patch=16, size=16), 1),
    (dict(stem="conv", patch=16, size=96), 36), (dict(patch=8, size=24, channels=1), 9)])
def test_any_size_that_the_patch_divides(arguments, tokens):
    model = vit(**{**SMALL, **arguments})
    assert model.output_shape == (None, 24) and model.layers[-1].name == "features"
    assert model.get_layer("norm").output_shape == (None, 1 + tokens, 24)
    batch = np.zeros((2, *model.input_shape[1:]), np.float32)
    map_of_tokens = keras.Model(model.input, model.get_layer("norm").output)(batch)
    np.testing.assert_array_equal(model(batch), map_of_tokens[:, 0])


@pytest.mark.parametrize("arguments, message", [
    (dict(size=33), "patch, 8 pixels.*size 33. Nearest: 32 or 40"), (dict(size=5), "size 5. Nearest: 8"),
    (dict(size=None), "size None"), (dict(stem="conv", patch=16, size=40), "size 40. Nearest: 32 or 48"),
    (dict(stem="conv"), "patches of 16 pixels.*patch 8"), (dict(stem="pool"), "patch, conv.*'pool'"),
    (dict(dim=25), "dim 25, heads 3. Nearest: 24 or 36"), (dict(depth=0), "at least 1")])
def test_sizes_that_do_not_fit_end_in_one_line(arguments, message):
    with pytest.raises(UsageError, match=message) as caught:
        vit(**{**SMALL, **arguments})
    assert "\n" not in str(caught.value)


def gradients(model, batch, **options):
    """The loss of a step and its gradients, in one compiled function."""
    @tf.function(**options)
    def step(batch):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.cast(model(batch, training=True)[:, :3], tf.float32))
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    return [value.numpy() for value in step(batch)]


def twins(drop_path=0.0):
    """Two networks that differ in rematerialisation only, what they draw included."""
    models = [vit(**dict(SMALL, depth=2), drop_path=drop_path, rematerialise=remat) for remat in (False, True)]
    models[1].set_weights(models[0].get_weights())
    for model in models:
        for layer in model.layers:
            if hasattr(layer, "generator"):
                layer.generator.reset_from_seed(7)
    return models


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_rematerialisation_changes_no_gradient(drop_path, jit_compile):
    kept, computed_again = [gradients(model, images(), jit_compile=jit_compile) for model in twins(drop_path)]
    assert len(kept) == 1 + 29
    for ours, expected in zip(computed_again, kept):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


MEMORY = """
import resource, sys
import tensorflow as tf
from moco_tf.backbones.vit import vit
model = vit(dim=96, depth=12, heads=6, size=224, rematerialise=sys.argv[1] == "yes")
@tf.function
def step(batch):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(batch, training=True))
    return tape.gradient(loss, model.trainable_variables)
batch = tf.zeros((16, 224, 224, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(batch)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_rematerialisation_needs_less_than_half_the_memory():
    def mebibytes(remat):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", MEMORY, remat], capture_output=True, text=True, check=True,
                              timeout=300, env=environment)
        return float(done.stdout)

    assert mebibytes("yes") < 0.5 * mebibytes("no")    # measured: 202 and 680


def test_stochastic_depth_drops_branches_of_single_images_in_training_only():
    """With one branch silenced, a block adds the other; training leaves it out, or divides it by the chance to stay."""
    for silenced in ("proj", "fc2"):
        block = Block(heads=3, drop_path=0.25)
        tokens = tf.repeat(tf.random.stateless_normal((1, 5, 24), (0, 1)), 2000, axis=0)
        block.build(tokens.shape)
        getattr(block, silenced).set_weights([np.zeros_like(w) for w in getattr(block, silenced).get_weights()])
        branch = (block(tokens, training=False) - tokens)[0]
        added = block(tokens, training=True) - tokens
        left_out = ~np.any(added, axis=(1, 2))
        expected = np.where(left_out[:, None, None], 0.0, branch / 0.75)
        np.testing.assert_allclose(added, expected, rtol=1e-4, atol=1e-4)
        assert abs(left_out.mean() - 0.25) < 0.04    # four standard deviations
        block_of_zero = Block.from_config(dict(block.get_config(), drop_path=0.0))
        block_of_zero.build(tokens.shape)
        block_of_zero.set_weights(block.get_weights())
        np.testing.assert_allclose(block_of_zero(tokens, training=True), block(tokens, training=False), rtol=1e-6)


def test_stochastic_depth_grows_linearly_with_depth():
    rates = [layer.drop_path for layer in vit(**dict(SMALL, depth=5), drop_path=0.2).layers if isinstance(layer, Block)]
    np.testing.assert_allclose(rates, [0, 0.05, 0.1, 0.15, 0.2])


def test_what_stochastic_depth_draws_goes_on_from_a_checkpoint(tmp_path):
    model = vit(**SMALL, drop_path=0.5)
    batch = images(16)
    path = tf.train.Checkpoint(model=model).save(str(tmp_path / "checkpoint"))
    first = model(batch, training=True).numpy()
    assert np.abs(model(batch, training=True).numpy() - first).max() > 0.01
    fresh = vit(**SMALL, drop_path=0.5)
    tf.train.Checkpoint(model=fresh).restore(path).assert_consumed()
    np.testing.assert_allclose(fresh(batch, training=True), first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, dtype", [("mixed_bfloat16", tf.bfloat16), ("mixed_float16", tf.float16)])
def test_softmax_and_norms_are_float32_under_mixed_precision(policy, name, dtype):
    policy(name)
    model = vit(**SMALL)
    assert model.output.dtype == dtype and {variable.dtype for variable in model.weights} == {tf.float32}
    graph = tf.function(lambda batch: model(batch, training=True)).get_concrete_function(
        tf.TensorSpec((2, 32, 32, 3))).graph

    def dtypes(kind):
        return {op.outputs[0].dtype for op in graph.get_operations() if op.type == kind}

    assert dtypes("Softmax") == dtypes("SquaredDifference") == dtypes("Rsqrt") == {tf.float32}
    assert dtypes("BatchMatMulV2") == dtypes("MatMul") == dtypes("Erf") == {dtype}
    policy("float32")
    exact = vit(**SMALL)
    exact.set_weights(model.get_weights())
    expected = exact(images()).numpy()
    np.testing.assert_allclose(tf.cast(model(images()), tf.float32), expected, rtol=0, atol=0.05)


def test_bfloat16_trains_with_rematerialisation(policy):
    policy("mixed_bfloat16")
    kept, computed_again = [gradients(model, images()) for model in twins()]
    for ours, expected in zip(computed_again, kept):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-2 * np.abs(expected).max())


def test_replicas_with_rematerialisation_sum_up_to_the_gradient_of_the_batch():
    model = vit(**dict(SMALL, depth=1))
    expected = gradients(model, images())
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"],
                                              cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        mirrored = vit(**dict(SMALL, depth=1), rematerialise=True)
    mirrored.set_weights(model.get_weights())

    @tf.function
    def step():
        def of_replica():
            here = 2 * tf.distribute.get_replica_context().replica_id_in_sync_group
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(mirrored(tf.constant(images())[here:here + 2], training=True)[:, :3])
            return [loss, *tape.gradient(loss, mirrored.trainable_variables)]
        return strategy.reduce("SUM", strategy.run(of_replica), axis=None)

    for ours, theirs in zip(step(), expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["float32", "mixed_bfloat16", "float64"])
def test_a_momentum_copy_computes_the_same_and_is_frozen(policy, name):
    policy(name)
    model = vit(**SMALL, freeze_patch=True, drop_path=0.1, rematerialise=True)
    policy("float32")    # the copy goes by its original, not by the policy of the day
    model.set_weights([w + 0.1 for w in model.get_weights()])
    twin = momentum_copy(model)
    assert not twin.trainable_weights and [w.name for w in twin.weights] == [w.name for w in model.weights]
    assert twin.output.dtype == model.output.dtype
    np.testing.assert_array_equal(twin(images()), model(images()))


@pytest.mark.parametrize("stem", [{}, dict(stem="conv", patch=16)])
def test_xla_computes_the_same(stem):
    model = vit(**{**SMALL, "depth": 1, **stem})
    for ours, expected in zip(gradients(model, images(), jit_compile=True), gradients(model, images())):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
