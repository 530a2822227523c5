"""Draws: their distribution, and that they depend on (seed, step) alone."""

import collections
import functools

import numpy as np
import pytest
import tensorflow as tf

from moco_tf import sampling
from moco_tf.errors import DataError


def represented(acceptance, alias):
    """The distribution that a table stands for."""
    return (acceptance + np.bincount(alias, weights=1 - acceptance, minlength=len(alias))) / len(alias)


def test_uniform_draws_reach_every_row_equally_often():
    draws = sampling.uniform(0, 0, [200, 1000], 50).numpy()
    assert draws.dtype == np.int64 and draws.min() == 0 and draws.max() == 49
    counts = np.bincount(draws.ravel(), minlength=50)
    assert ((counts - 4000) ** 2 / 4000).sum() < 96    # chi squared of 49 degrees of freedom: above it 1 time in 10,000
    counts = collections.Counter(zip(draws[:, :-1].ravel() // 10, draws[:, 1:].ravel() // 10))
    assert max(counts.values()) / min(counts.values()) < 1.1    # neighbours know nothing of each other


def test_draws_are_a_function_of_seed_and_step():
    uniform = functools.partial(sampling.uniform, shape=[64], size=10 ** 7)
    weighted = functools.partial(sampling.weighted, shape=[64], table=sampling.alias_table(np.arange(100) + 1))
    step = tf.constant(5, tf.int64)
    for draw in (uniform, weighted):
        drawn = draw(3, step).numpy()
        for jit in (False, True):
            np.testing.assert_array_equal(tf.function(draw, jit_compile=jit)(3, step), drawn)
        for others in (draw(3, 6), draw(4, 5)):
            assert (others.numpy() != drawn).mean() > 0.8


def test_a_large_bank_is_drawn_from_to_its_end():
    draws = sampling.uniform(0, 0, [100_000], 14_000_000).numpy()
    np.testing.assert_allclose(np.quantile(draws / 14e6, [0.01, 0.25, 0.5, 0.75, 0.99]), [0.01, 0.25, 0.5, 0.75, 0.99],
                               atol=0.008)
    assert len(np.unique(draws % 4096)) == 4096    # low bits vary too


@pytest.mark.parametrize("weights", [np.ones(9), [0, 0, 5], [1e-9, 1, 1e9],
                                     np.random.default_rng(0).gamma(0.3, size=1000)])
def test_an_alias_table_stands_for_its_weights(weights):
    acceptance, alias = sampling.alias_table(weights)
    assert acceptance.min() >= 0 and acceptance.max() <= 1
    np.testing.assert_allclose(represented(acceptance, alias), weights / np.sum(weights), atol=1e-12)


def test_weighted_draws_have_the_weights():
    weights = np.array([0.0, 1.0, 2.0, 5.0, 12.0])
    draws = sampling.weighted(0, 0, [100_000], sampling.alias_table(weights)).numpy()
    np.testing.assert_allclose(np.bincount(draws, minlength=5) / 1e5, weights / 20, atol=0.006)
    assert (draws != 0).all()


@pytest.mark.parametrize("values, told", [
    (np.ones(5), r"each of the 4 training images.*shape \(5,\)"), (np.ones((2, 2)), "each of the 4"),
    ([1, 2, -1, 3], "from -1.0 to 3.0"), ([0, 0, 0, 0], "not all zero"), ([1, np.nan, 1, 1], "finite"),
    (["a", "b", "c", "d"], "numbers"), (None, "weights.npy"), (b"1 2 3 4", "weights.npy")])
def test_files_that_hold_no_weights_are_refused_in_one_line(values, told, tmp_path):
    path = tmp_path / "weights.npy"
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif values is not None:
        np.save(path, values)
    with pytest.raises(DataError, match=told) as refused:
        sampling.read_table(str(path), 4)
    assert "\n" not in str(refused.value)


def test_the_table_of_a_file_is_that_of_its_numbers(tmp_path):
    weights = np.random.default_rng(0).integers(0, 9, 50)
    np.save(tmp_path / "weights.npy", weights)
    np.testing.assert_allclose(represented(*sampling.read_table(str(tmp_path / "weights.npy"), 50)), weights / weights.sum(),
                               atol=1e-12)


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [1, np.nan], [[1]], []])
def test_weights_that_cannot_be_drawn_by_are_refused(weights):
    with pytest.raises(ValueError, match="finite numbers >= 0"):
        sampling.alias_table(weights)
