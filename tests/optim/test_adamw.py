"""AdamW: first steps by hand, decay by name; whole trajectories are in tests/golden."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.distribute import apply_gradients_if
from moco_tf.optim.adamw import AdamW


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_the_first_step_has_the_length_of_the_learning_rate(scale):
    gradient = scale * np.array([1.0, -2.0, 0.5])
    variable = tf.Variable(np.zeros(3))
    AdamW(0.01).apply_gradients([(tf.constant(gradient), variable)])
    # |g| / (|g| + epsilon): Keras' AdamW would have 1e-8 / sqrt(.001) for the epsilon, 30 times as much.
    np.testing.assert_allclose(variable, -0.01 * gradient / (np.abs(gradient) + 1e-8), rtol=1e-6)    # lr is float32


def test_decay_spares_the_excluded_names():
    kernel, bias = tf.Variable(np.ones((2, 2)), name="fc/kernel"), tf.Variable(np.ones(2), name="fc/bias")
    optimizer = AdamW(0.5, weight_decay=0.1, exclude=("bias$",))
    optimizer.apply_gradients([(tf.zeros_like(kernel), kernel), (tf.zeros_like(bias), bias)])
    np.testing.assert_allclose(kernel, np.full((2, 2), 0.95), rtol=1e-7)
    np.testing.assert_array_equal(bias, np.ones(2))


def test_skipped_steps_do_not_count_into_the_averages():
    optimizer, variable = AdamW(0.01), tf.Variable([0.0])
    optimizer.build([variable])
    apply_gradients_if(tf.constant(False), optimizer, [tf.constant([3.0])], [variable])
    apply_gradients_if(tf.constant(True), optimizer, [tf.constant([3.0])], [variable])
    np.testing.assert_allclose(variable, [-0.01], rtol=1e-6)
