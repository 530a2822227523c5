"""LAMB of TensorFlow Addons behind our interface: its rule, and names."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.optim.lamb import LAMB


def variables():
    return [tf.Variable([[3.0, 4.0]], name="fc/kernel"), tf.Variable([1.0, 1.0], name="fc/bias")]


def test_a_step_is_as_long_as_the_learning_rate_times_the_parameter():
    kernel, bias = variables()
    optimizer = LAMB(0.1, exclude=("bias",))
    optimizer.build([kernel, bias])
    optimizer.apply_gradients([(tf.constant([[1e-3, 2e3]]), kernel), (tf.constant([1e-3, 2e3]), bias)])
    np.testing.assert_allclose(np.linalg.norm(kernel - [[3.0, 4.0]]), 0.1 * 5.0, rtol=1e-5)
    np.testing.assert_allclose(bias, [0.9, 0.9], rtol=2e-3)    # excluded: Adam's first step; epsilon is 1e-6


def test_an_unknown_name_is_refused():
    with pytest.raises(UsageError, match="'biass'.*Nearest: bias"):
        LAMB(0.1, exclude=("biass",)).build(variables())
