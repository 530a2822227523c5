"""The momentum encoder: a copy that follows the query encoder (MoCo v1, eq. 2)."""

import tensorflow as tf

from moco_tf.distribute import update_copies
from moco_tf.errors import UsageError

keras = tf.keras


def copy_of(encoder):
    """A twin of `encoder` with equal weights and statistics."""
    twin = keras.models.clone_model(encoder)
    twin.set_weights(encoder.get_weights())
    return twin


def momentum_copy(encoder):
    """As `copy_of`, with none of the weights trainable.

    Our BatchNorm does not look at `trainable`: the twin still normalises by the batch, and keeps statistics of its own.
    """
    twin = copy_of(encoder)
    twin.trainable = False
    return twin


def require_momentum(momentum):
    """Raises UsageError unless it is a share of the momentum encoder."""
    if not 0 <= momentum <= 1:
        raise UsageError("method.momentum is the share of the momentum encoder that a step keeps, from 0 to 1. "
                         f"Received: {momentum}. The papers' are 0.99 to 0.999.")


def momentum_update(twin, encoder, momentum, buffers=False):
    """Parameters of `twin` <- momentum * theirs + (1 - momentum) * those of `encoder`.

    `momentum` may be a tensor, equal on all replicas. Parameters only: statistics of BatchNorm are buffers, which each
    encoder keeps from its own forward passes; with `buffers` they are averaged too, for a twin that makes none.
    """
    rest = 1.0 - momentum
    pairs = [(copy, variable) for copy, variable in zip(twin.weights, encoder.weights)
             if variable.trainable or (buffers and variable.dtype.is_floating)]

    def follow(copy, variable):
        step = tf.cast(rest, copy.dtype) if tf.is_tensor(rest) else tf.constant(rest, copy.dtype)
        # copy -= step * (copy - variable), in one pass less than `assign_sub` takes.
        tf.raw_ops.ResourceApplyGradientDescent(var=copy.handle, alpha=step, delta=copy - variable)

    update_copies(follow, *zip(*pairs))
