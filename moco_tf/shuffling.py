"""Shuffling BN (MoCo v1, sec. 3.3): the keys of a group of queries must not share one group's batch statistics."""

import tensorflow as tf


def key_permutation(seed, step, batch, group):
    """The order in which the key images of a global batch are encoded: entry i is the image at place i.

    A uniform draw among the permutations that leave no BatchNorm group of keys equal to a group of queries; a function
    of (seed, step) alone.

    Args:
        seed, step: integers; `step` may be a tensor.
        batch: images of the global batch.
        group: images that share batch statistics; with one group there is nothing to separate, and any order will do.

    Returns:
        (batch,) int32.
    """
    def draw(attempt):
        key = tf.stack([tf.cast(seed, tf.int32) + 7919 * attempt, tf.cast(step, tf.int32)])
        # Integers: XLA and plain TensorFlow draw the same ones, of floats they do not.
        numbers = tf.random.stateless_uniform([batch], seed=key, minval=None, maxval=None, dtype=tf.int32)
        return tf.argsort(numbers, stable=True)

    def coincides(permutation):
        groups = tf.reshape(permutation // group, [-1, group])
        return tf.reduce_any(tf.reduce_min(groups, axis=1) == tf.reduce_max(groups, axis=1))

    if group >= batch or group < 2:
        return draw(0)
    _, permutation = tf.while_loop(lambda attempt, permutation: coincides(permutation),
                                   lambda attempt, permutation: (attempt + 1, draw(attempt + 1)),
                                   (0, draw(0)))
    return permutation


def positions(permutation):
    """Where each image's key stands in the permuted order: the inverse permutation, (batch,) int32."""
    return tf.math.invert_permutation(permutation)
