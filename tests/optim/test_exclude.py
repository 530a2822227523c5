"""Parameters by name: what a pattern matches, and what is said of one that matches nothing."""

import pytest
import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.optim.exclude import excluded

VARIABLES = [tf.Variable(0.0, name=name) for name in
             ("tokens/pos_embed", "blocks.0/kernel", "blocks.0/bias", "blocks.0/gamma", "unbiased/kernel")]


@pytest.mark.parametrize("patterns, expected", [
    ((), [False] * 5), (("bias$",), [False, False, True, False, False]), (("bias",), [False, False, True, False, True]),
    (("pos_embed", "gamma"), [True, False, False, True, False])])
def test_patterns_are_searched_in_names(patterns, expected):
    assert excluded(patterns, VARIABLES) == expected


@pytest.mark.parametrize("pattern, nearest", [
    ("pos_embedding", "pos_embed"), ("gama", "gamma"), ("running_mean", "bias, gamma, kernel, pos_embed")])
def test_an_unknown_name_is_refused_with_the_nearest(pattern, nearest):
    with pytest.raises(UsageError, match=f"'{pattern}'.*Nearest: .*{nearest}"):
        excluded(("bias", pattern), VARIABLES)


def test_a_broken_pattern_is_refused():
    with pytest.raises(UsageError, match=r"'\(bias'"):
        excluded(("(bias",), VARIABLES)
