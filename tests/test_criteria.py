"""What logits cost: NCE and InfoNCE against formulas in NumPy, and the Z that NCE keeps."""

import math

import numpy as np
import pytest
import tensorflow as tf

import linear_methods
from moco_tf.criteria import LOSSES, InfoNCE, NCE, make_criterion
from moco_tf.errors import UsageError

keras = tf.keras
SIZE, NEGATIVES = 50, 12


def logits(seed=0, rows=6):
    """(rows, 13) cosines over a temperature of 0.2, as far as cosines go."""
    return np.random.default_rng(seed).uniform(-1, 1, size=(rows, 1 + NEGATIVES)) / 0.2


def nce(logits, z, size=SIZE, epsilon=1e-7):
    """The sum over a positive's and its negatives' terms, as published: P against P + K/n."""
    probability, noise = np.exp(logits) / z, (logits.shape[1] - 1) / size
    positive = np.log(probability[:, 0] / (probability[:, 0] + noise + epsilon))
    return -positive - np.log(noise / (probability[:, 1:] + noise + epsilon)).sum(axis=1)


def tensor(values):
    return tf.constant(values, keras.backend.floatx())


def test_info_nce_is_a_cross_entropy():
    losses, noted = InfoNCE()(tensor(logits()))
    exponents = np.exp(logits())
    expected = -np.log(exponents[:, 0] / exponents.sum(axis=1))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(noted["probability"], np.exp(-expected).mean(), rtol=1e-5)


@pytest.mark.parametrize("momentum", [1.0, 0.99, 0.5])
def test_nce_in_float64_over_several_steps(momentum):
    """The first batch's estimate, positives among it, then as much of the later ones as the momentum leaves."""
    with linear_methods.float64():
        criterion, z = NCE(SIZE, dim=16, temperature=0.2, partition_momentum=momentum), None
        assert float(criterion.partition) == -1
        for step in range(4):
            estimate = SIZE * np.exp(logits(step)).mean()
            z = estimate if z is None else momentum * z + (1 - momentum) * estimate
            losses, noted = criterion(tensor(logits(step)))
            np.testing.assert_allclose(losses, nce(logits(step), z), rtol=1e-12)
            criterion.update(noted, write=True)
            np.testing.assert_allclose(criterion.partition, z, rtol=1e-12)


def test_a_step_has_one_z_whatever_it_scores():
    """That of its first call, as where the reference sets it: the loss of other logits by the first one's Z."""
    with linear_methods.float64():
        criterion = NCE(SIZE, dim=16, temperature=0.2, partition_momentum=0.9)
        _, noted = criterion(tensor(logits()))
        losses, again = criterion(tensor(logits(1)), noted)
        z = SIZE * np.exp(logits()).mean()
        np.testing.assert_allclose(losses, nce(logits(1), z), rtol=1e-12)
        np.testing.assert_allclose([noted["partition"], again["partition"]], z, rtol=1e-12)


def test_gradients_do_not_flow_through_z():
    """d loss / d logit = -(K/n) / (P + K/n) for the positive, P / (P + K/n) for a negative."""
    with linear_methods.float64():
        criterion, values = NCE(SIZE, dim=16, temperature=0.2), tensor(logits())
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = tf.reduce_sum(criterion(values)[0])
        gradient = tape.gradient(loss, values)
        probability, noise = np.exp(logits()) / (SIZE * np.exp(logits()).mean()), NEGATIVES / SIZE + 1e-7
    expected = probability / (probability + noise)
    expected[:, 0] = -noise / (probability[:, 0] + noise)
    np.testing.assert_allclose(gradient, expected, rtol=1e-9)


def test_z_moves_only_by_steps_that_count():
    criterion = NCE(SIZE, dim=16, temperature=0.2, partition_momentum=0.9)
    _, noted = criterion(tensor(logits()))
    assert float(criterion.partition) == -1    # a call alone remembers nothing
    criterion.update(noted, write=False)
    assert float(criterion.partition) == -1
    criterion.update(noted, write=True)
    first = float(criterion.partition)
    _, broken = criterion(tensor(np.full_like(logits(), np.nan)))
    criterion.update(broken, write=tf.constant(False))
    assert float(criterion.partition) == first


def test_metrics_tell_whether_z_fits():
    """Near 1, against n exp(1 / (2 C T^2)) for rows at random; the probability of the positive is exp(logit) / Z."""
    rng = np.random.default_rng(0)
    rows = linear_methods.unit(rng.normal(size=(4000, 128)))
    cosines = linear_methods.unit(rng.normal(size=(64, 128))) @ rows.T / 0.07
    criterion = NCE(SIZE, dim=128, temperature=0.07)
    _, noted = criterion(tensor(cosines))
    metrics = criterion.metrics_of(noted)
    assert abs(float(metrics["partition_ratio"]) - 1) < 0.05
    expected = np.exp(cosines[:, 0]).mean() / (SIZE * np.exp(cosines).mean())
    np.testing.assert_allclose(metrics["positive_probability"], expected, rtol=1e-4)
    assert InfoNCE().metrics_of(InfoNCE()(tensor(logits()))[1]).keys() == {"positive_probability"}


def test_large_logits_do_not_overflow():
    extreme = np.array([[30.0, *[-30.0] * NEGATIVES], [-30.0, *[30.0] * NEGATIVES]])
    criterion = NCE(SIZE, dim=16, temperature=0.2)
    losses, _ = criterion(tensor(extreme))
    np.testing.assert_allclose(losses, nce(extreme, SIZE * np.exp(extreme).mean()), rtol=1e-4)


@pytest.mark.parametrize("loss, expected", [
    ("softmax", math.log(13)), ("nce", math.log(13) + 12 * math.log(13 / 12))])
def test_chance_is_the_loss_of_logits_alike(loss, expected):
    criterion = make_criterion(loss, SIZE, 16, 0.2)
    np.testing.assert_allclose(criterion(tf.zeros((4, 13)))[0], expected, rtol=1e-5)
    assert criterion.chance(NEGATIVES) == pytest.approx(expected)


def test_replicas_estimate_one_z():
    """Of all their logits, so that losses are those of one replica."""
    values, strategy = logits(rows=8).astype(np.float32), linear_methods.strategy_of(2)
    one, one_noted = NCE(SIZE, dim=16, temperature=0.2)(tensor(values))
    with strategy.scope():
        criterion = NCE(SIZE, dim=16, temperature=0.2)

        @tf.function
        def step():
            def here():
                first = 4 * tf.distribute.get_replica_context().replica_id_in_sync_group
                losses, noted = criterion(tf.slice(values, [first, 0], [4, 13]))
                criterion.update(noted, True)
                return losses

            return strategy.run(here)

        losses = strategy.experimental_local_results(step())
    np.testing.assert_allclose(np.concatenate(losses), one, rtol=1e-5)
    for copy in strategy.experimental_local_results(criterion.partition):
        np.testing.assert_allclose(copy, one_noted["partition"], rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_losses_stay_float32(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        criteria = [make_criterion(loss, SIZE, 16, 0.2) for loss in LOSSES]
    finally:
        keras.mixed_precision.set_global_policy("float32")
    for criterion in criteria:
        assert criterion(tensor(logits()))[0].dtype == tf.float32
    assert criteria[1].partition.dtype == tf.float32


@pytest.mark.parametrize("arguments, told", [
    (("hinge",), "method.loss must be one of softmax, nce. Received: 'hinge'"),
    (("nce",), "number of training images. Received: 0"),
    (("softmax", 0, 0, -0.1), "temperature .* must be above 0. Received: -0.1"),
    (("nce", SIZE, 16, 0.2, 1.01), "partition_momentum .* from 0 to 1. Received: 1.01")])
def test_settings_that_cannot_be_are_refused_in_one_line(arguments, told):
    with pytest.raises(UsageError, match=told) as refused:
        make_criterion(*arguments)
    assert "\n" not in str(refused.value)
