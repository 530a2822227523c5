"""What the training step asks of every optimizer: conditional steps on any number of replicas, checkpoints, XLA."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.distribute import apply_gradients_if
from moco_tf.optim import OPTIMIZERS
from moco_tf.optim.schedules import EpochSchedule

BIAS = dict(exclude=("bias",))
OPTIONS = {"sgd": {}, "lars": BIAS, "adamw": BIAS, "lamb": BIAS}
GRADIENTS = [([[1.0, -2.0]], [0.5, 3.0]), ([[-3.0, 0.1]], [1.0, 1.0]), ([[0.2, 5.0]], [-1.0, 2.0])]


def built(name):
    """An optimizer whose rate is .1, then .01 from its third step on, and two variables."""
    variables = [tf.Variable([[3.0, 4.0]], name="fc/kernel"), tf.Variable([1.0, 1.0], name="fc/bias")]
    schedule = EpochSchedule("steps", 0.1, epochs=4, steps_per_epoch=1, milestones=(2,))
    optimizer = OPTIMIZERS[name](schedule, weight_decay=0.1, **OPTIONS[name])
    optimizer.build(variables)
    return optimizer, variables


def walked(optimizer, variables, gradients, jit_compile=None):
    @tf.function(jit_compile=jit_compile)
    def step(gradients):
        optimizer.apply_gradients(zip(gradients, variables), skip_gradients_aggregation=True)

    for pair in gradients:
        step([tf.constant(gradient) for gradient in pair])
    return [variable.numpy() for variable in variables]


def test_every_optimizer_is_tried():
    assert sorted(OPTIONS) == sorted(OPTIMIZERS)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_that_may_not_be_taken_only_counts(name, replicas):
    strategy = tf.distribute.get_strategy() if replicas == 1 else tf.distribute.MirroredStrategy(
        ["/cpu:0", "/cpu:1"], cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        optimizer, variables = built(name)
    step = tf.function(lambda good, gradients: strategy.run(
        lambda: apply_gradients_if(good, optimizer, gradients, variables)))
    for good, pair in ((True, GRADIENTS[0]), (False, GRADIENTS[1]), (True, GRADIENTS[2])):
        step(tf.constant(good), [tf.constant(gradient) for gradient in pair])
        if not good:
            np.testing.assert_array_equal(before, variables[0].numpy())
        before = variables[0].numpy()
    assert int(optimizer.iterations.numpy()) == 3
    # As if the step had never been, but for the schedule: the third step has the third step's rate.
    expected, others = built(name)
    walked(expected, others, GRADIENTS[:1])
    expected.iterations.assign(2)
    kernel, bias = walked(expected, others, GRADIENTS[2:])
    np.testing.assert_allclose(variables[0].numpy(), kernel, rtol=1e-6)
    np.testing.assert_allclose(variables[1].numpy(), bias, rtol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_restored_optimizer_goes_on_as_if_nothing_had_been(name, tmp_path):
    optimizer, variables = built(name)
    walked(optimizer, variables, GRADIENTS[:2])
    path = tf.train.Checkpoint(optimizer=optimizer, variables=variables).write(str(tmp_path / "saved"))
    expected = walked(optimizer, variables, GRADIENTS[2:])
    other, restored = built(name)
    tf.train.Checkpoint(optimizer=other, variables=restored).read(path).assert_existing_objects_matched()
    for value, wanted in zip(walked(other, restored, GRADIENTS[2:]), expected):
        np.testing.assert_array_equal(value, wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_it_compiles_to_equal_values(name):
    for value, wanted in zip(walked(*built(name), GRADIENTS, jit_compile=True), walked(*built(name), GRADIENTS)):
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
