"""LARS by its rules: which parameters are adapted, and that a step's length follows from them alone."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.optim.lars import LARS


def stepped(gradient_scale=1.0, **options):
    """Values before and after one step of lr 1 on a matrix, a bias and a token of rank 3."""
    random = np.random.default_rng(0)
    variables = [tf.Variable(random.normal(size=shape), name=name) for name, shape in
                 (("fc/kernel", (4, 3)), ("fc/bias", (3,)), ("tokens/cls_token", (1, 1, 5)))]
    gradients = [tf.constant(gradient_scale * random.normal(size=v.shape)) for v in variables]
    before = [v.numpy() for v in variables]
    optimizer = LARS(1.0, **options)
    optimizer.apply_gradients(zip(gradients, variables))
    return before, [v.numpy() for v in variables], [g.numpy() for g in gradients]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_a_matrix_moves_by_trust_times_its_norm_however_large_the_gradient(scale):
    before, after, gradients = stepped(scale, trust=0.02)
    for position in (0, 2):
        moved = np.linalg.norm(after[position] - before[position])
        np.testing.assert_allclose(moved, 0.02 * np.linalg.norm(before[position]), rtol=1e-12)
    np.testing.assert_allclose(after[1], before[1] - gradients[1], rtol=1e-12)    # a bias: plain SGD, without decay


def test_decay_turns_the_step_towards_zero_but_does_not_lengthen_it():
    before, after, gradients = stepped(trust=0.02, weight_decay=100.0)
    step = before[0] - after[0]
    np.testing.assert_allclose(np.linalg.norm(step), 0.02 * np.linalg.norm(before[0]), rtol=1e-12)
    direction = gradients[0] + 100.0 * before[0]
    np.testing.assert_allclose(step / np.linalg.norm(step), direction / np.linalg.norm(direction), rtol=1e-12)


def test_an_excluded_name_is_treated_like_a_bias():
    before, after, gradients = stepped(weight_decay=0.1, exclude=("cls_token",))
    np.testing.assert_allclose(after[2], before[2] - gradients[2], rtol=1e-12)
    assert not np.allclose(after[0], before[0] - gradients[0])


@pytest.mark.parametrize("start, gradient", [(0.0, 1.0), (1.0, 0.0)])
def test_a_norm_of_zero_leaves_the_gradient_as_it_is(start, gradient):
    variable = tf.Variable(tf.fill((2, 2), start))
    LARS(0.5).apply_gradients([(tf.fill((2, 2), gradient), variable)])
    np.testing.assert_array_equal(variable, np.full((2, 2), start - 0.5 * gradient))
