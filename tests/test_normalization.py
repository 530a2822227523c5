"""BatchNorm against NumPy in float64, and the promises in its docstring."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.normalization import ALL_REPLICAS, BatchNorm

keras = tf.keras
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}


def batch(shape, seed=0):
    """Channels of different location and spread."""
    random = np.random.default_rng(seed)
    return random.normal(random.uniform(-2, 2, shape[-1]), random.uniform(0.5, 3, shape[-1]), shape)


def reference(x, group_size, gamma, beta):
    """Outputs, and the moving mean and variance after one step from (0, 1), by the definition."""
    outputs, means, variances = [], [], []
    for start in range(0, len(x), group_size):
        part = x[start:start + group_size]
        axes = tuple(range(part.ndim - 1))
        mean, variance = part.mean(axes), part.var(axes)
        outputs.append((part - mean) / np.sqrt(variance + 1e-5) * gamma + beta)
        means.append(mean)
        variances.append(part.var(axes, ddof=1))
    return np.concatenate(outputs), 0.1 * np.mean(means, 0), 0.9 + 0.1 * np.mean(variances, 0)


def layer_for(x, gamma, beta, **kwargs):
    layer = BatchNorm(**kwargs)
    layer.build(x.shape)
    layer.set_weights([gamma, beta, np.zeros_like(gamma), np.ones_like(gamma)])
    return layer


@pytest.mark.parametrize("dtype", sorted(TOLERANCE))
@pytest.mark.parametrize("shape", [(12, 5), (12, 4, 3, 5)])
@pytest.mark.parametrize("group_size", [None, 12, 4])
def test_training_equals_the_definition(shape, group_size, dtype):
    x = np.asarray(tf.cast(batch(shape), dtype).numpy(), np.float64)
    gamma, beta = np.linspace(0.5, 2, 5), np.linspace(-1, 1, 5)
    policy = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}.get(dtype, dtype)
    layer = layer_for(x, gamma, beta, group_size=group_size, dtype=policy)
    output = tf.function(layer)(tf.cast(x, dtype), training=True)
    expected, mean, variance = reference(x, group_size or len(x), gamma, beta)

    assert output.dtype == dtype
    assert {v.dtype for v in layer.variables} == {tf.float64 if dtype == "float64" else tf.float32}
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(tf.cast(output, tf.float64), expected, rtol=tolerance, atol=4 * tolerance)
    statistics = min(tolerance, 2e-6)    # never in half precision
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=statistics, atol=statistics)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=statistics, atol=statistics)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(12, 5), (12, 4, 3, 5)])
def test_gradients_equal_the_definition(shape, dtype):
    x, upstream = batch(shape), batch(shape, seed=1)
    gamma = np.linspace(0.5, 2, 5)
    layer = layer_for(x, gamma, np.zeros(5), group_size=4, dtype=dtype)
    with tf.GradientTape() as tape:
        inputs = tf.constant(x, dtype)
        tape.watch(inputs)
        total = tf.reduce_sum(layer(inputs, training=True) * tf.cast(upstream, dtype))
    gradients = tape.gradient(total, [inputs, layer.gamma, layer.beta])

    axes = tuple(range(x.ndim - 1))
    for_inputs, for_gamma = [], 0
    for start in range(0, 12, 4):
        part, up = x[start:start + 4], upstream[start:start + 4]
        deviation = np.sqrt(part.var(axes) + 1e-5)
        unit = (part - part.mean(axes)) / deviation
        for_inputs.append(gamma / deviation * (up - up.mean(axes) - unit * (up * unit).mean(axes)))
        for_gamma = for_gamma + (up * unit).sum(axes)
    tolerance = 10 * TOLERANCE[dtype]
    for value, expected in zip(gradients, (np.concatenate(for_inputs), for_gamma, upstream.sum(axes))):
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 4, 5)])
def test_inference_uses_the_moving_statistics_and_leaves_them(shape):
    layer = BatchNorm(group_size=4)    # does not divide the batch, and need not
    layer.build(shape)
    weights = [np.full(5, value, np.float32) for value in (2, 1, 3, 4)]
    layer.set_weights(weights)
    x = batch(shape).astype(np.float32)
    np.testing.assert_allclose(layer(x), (x - 3) / np.sqrt(4 + 1e-5) * 2 + 1, atol=1e-5)
    np.testing.assert_array_equal(layer.get_weights(), weights)


def test_a_frozen_layer_still_normalises_by_its_batch():
    x = batch((8, 2, 2, 3)).astype(np.float32)
    layer = BatchNorm(trainable=False)
    np.testing.assert_allclose(np.mean(layer(x, training=True), (0, 1, 2)), np.zeros(3), atol=1e-5)
    assert np.all(layer.moving_mean.numpy() != 0)


def test_a_channel_that_is_not_finite_keeps_its_moving_statistics():
    x = batch((8, 2, 2, 3)).astype(np.float32)
    x[5, 1, 0, 1] = np.inf
    layer = BatchNorm(group_size=4)
    layer(x, training=True)
    np.testing.assert_array_equal([layer.moving_mean[1], layer.moving_variance[1]], [0, 1])
    _, mean, variance = reference(x[..., ::2].astype(np.float64), 4, np.ones(2), np.zeros(2))
    np.testing.assert_allclose(layer.moving_mean.numpy()[::2], mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy()[::2], variance, rtol=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_compiles_with_xla_to_equal_results(policy):
    x = tf.constant(batch((8, 4, 4, 3)), tf.float32)
    plain, compiled = BatchNorm(group_size=4, dtype=policy), BatchNorm(group_size=4, dtype=policy)
    expected = plain(x, training=True)
    output = tf.function(lambda images: compiled(images, training=True), jit_compile=True)(x)
    # A rounding to bfloat16 may fall on either side.
    np.testing.assert_allclose(tf.cast(output, tf.float32), tf.cast(expected, tf.float32),
                               rtol=1e-5 if policy == "float32" else 2 ** -7, atol=1e-5)
    for value, wanted in zip(compiled.variables, plain.variables):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_two_replicas_move_the_statistics_as_one_and_alike():
    # Without collective kernels, whose keys clash between the strategies of one process.
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"],
                                              cross_device_ops=tf.distribute.ReductionToOneDevice())
    x = batch((8, 4, 4, 3)).astype(np.float32)
    one = BatchNorm(group_size=2)
    expected = one(x, training=True)
    with strategy.scope():
        layer = BatchNorm(group_size=2)
        layer.build(x.shape)
    halves = strategy.experimental_distribute_values_from_function(
        lambda context: tf.constant(x[4 * context.replica_id_in_sync_group:][:4]))
    step = tf.function(lambda part: strategy.run(lambda images: layer(images, training=True), args=(part,)))
    outputs = strategy.experimental_local_results(step(halves))
    np.testing.assert_allclose(np.concatenate(outputs), expected, rtol=1e-6, atol=1e-6)
    for variable, wanted in zip(layer.variables, one.variables):
        first, second = (copy.numpy() for copy in strategy.experimental_local_results(variable))
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, wanted, rtol=1e-6, atol=1e-7)


def on_two_replicas(x, upstream, dtype, moving_mean):
    """Outputs, the layer, and the gradients of sum(outputs * upstream), with ALL_REPLICAS on halves of the batch."""
    strategy = tf.distribute.MirroredStrategy(["/cpu:0", "/cpu:1"],
                                              cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        layer = BatchNorm(group_size=ALL_REPLICAS, dtype=dtype)
        layer.build(x.shape)
        layer.set_weights([np.linspace(0.5, 2, x.shape[-1]), np.linspace(-1, 1, x.shape[-1]), moving_mean,
                           np.ones(x.shape[-1])])
    half = len(x) // 2
    halves = strategy.experimental_distribute_values_from_function(lambda context: [
        tf.constant(v[half * context.replica_id_in_sync_group:][:half], dtype) for v in (x, upstream)])

    def pass_of_replica(part, up):
        with tf.GradientTape() as tape:
            tape.watch(part)
            outputs = layer(part, training=True)
            total = tf.reduce_sum(outputs * up)
        return outputs, tape.gradient(total, [part, layer.gamma, layer.beta])

    step = tf.function(lambda values: strategy.run(pass_of_replica, args=values))
    outputs, (for_inputs, for_gamma, for_beta) = step(halves)
    local = strategy.experimental_local_results
    for variable in layer.variables:
        first, second = local(variable)
        np.testing.assert_array_equal(first, second)
    return (np.concatenate(local(outputs)), layer,
            (np.concatenate(local(for_inputs)), np.sum(local(for_gamma), axis=0), np.sum(local(for_beta), axis=0)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("shape", [(12, 5), (12, 4, 3, 5)])
def test_synchronised_replicas_are_one_batch(shape, dtype):
    """Outputs, moving statistics with the whole batch's n - 1, and gradients, which pass through the collective."""
    x, upstream, gamma = batch(shape), batch(shape, seed=1), np.linspace(0.5, 2, 5)
    x[:6] += 3.0    # halves of different means
    outputs, layer, gradients = on_two_replicas(x, upstream, dtype, moving_mean=np.zeros(5))
    expected, mean, variance = reference(x, 12, gamma, np.linspace(-1, 1, 5))
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(outputs, expected, rtol=tolerance, atol=4 * tolerance)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(layer.moving_variance, variance, rtol=tolerance, atol=tolerance)

    axes = tuple(range(x.ndim - 1))
    deviation = np.sqrt(x.var(axes) + 1e-5)
    unit = (x - x.mean(axes)) / deviation
    for_inputs = gamma / deviation * (upstream - upstream.mean(axes) - unit * (upstream * unit).mean(axes))
    for value, wanted in zip(gradients, (for_inputs, (upstream * unit).sum(axes), upstream.sum(axes))):
        np.testing.assert_allclose(value, wanted, rtol=10 * tolerance, atol=10 * tolerance)


def test_synchronised_variances_survive_large_means_in_float32():
    """Once the moving mean has found the channel; with plain sums of squares the variance would be all rounding."""
    x = 1000.0 + np.random.default_rng(0).normal(scale=0.1, size=(64, 3))
    x = x.astype(np.float32).astype(np.float64)
    outputs, _, _ = on_two_replicas(x, np.ones_like(x), "float32", moving_mean=np.full(3, 1000.0))
    expected, _, _ = reference(x, 64, np.linspace(0.5, 2, 3), np.linspace(-1, 1, 3))
    np.testing.assert_allclose(outputs, expected, atol=2e-3)    # a last place of 1000 is 6e-4 standard deviations
    far, _, _ = on_two_replicas(x, np.ones_like(x), "float32", moving_mean=np.zeros(3))
    assert np.isfinite(far).all()


def test_one_replica_has_nothing_to_synchronise():
    x = batch((8, 4, 4, 3)).astype(np.float32)
    one, other = BatchNorm(group_size=ALL_REPLICAS), BatchNorm()
    np.testing.assert_array_equal(one(x, training=True), other(x, training=True))
    for value, wanted in zip(one.variables, other.variables):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("images, message", [(6, "6 images per replica, groups of 4"), (None, "unknown size")])
def test_a_batch_of_broken_groups_is_refused_while_tracing(images, message):
    layer = BatchNorm(group_size=4)
    step = tf.function(lambda x: layer(x, training=True))
    with pytest.raises(ValueError, match=message):
        step.get_concrete_function(tf.TensorSpec((images, 2, 2, 3)))


def test_an_input_without_a_batch_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        BatchNorm()(np.zeros((2, 3, 4), np.float32))


def test_every_argument_survives_cloning():
    config = dict(group_size=4, momentum=0.8, epsilon=1e-3, center=False, scale=True, gamma_initializer="zeros")
    layer = BatchNorm.from_config(BatchNorm(**config).get_config())
    kept = layer.get_config()
    assert {name: kept[name] for name in list(config)[:-1]} == dict(list(config.items())[:-1])
    layer.build((8, 3))
    assert [v.name for v in layer.variables] == ["gamma:0", "moving_mean:0", "moving_variance:0"]
    np.testing.assert_array_equal(layer.gamma, np.zeros(3))
