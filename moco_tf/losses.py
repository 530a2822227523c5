"""Unit rows in, losses in nats out: no state, no strategy. At least float32 whatever comes in."""

import tensorflow as tf


def at_least_float32(x):
    """Half precision up to float32; float32 and float64 as they are."""
    return tf.cast(x, tf.float32) if x.dtype in (tf.bfloat16, tf.float16) else x


def unit(rows):
    """(B, C) -> rows of norm 1; the norm is floored at 1e-12, as in PyTorch's `normalize`."""
    return tf.math.l2_normalize(at_least_float32(rows), axis=1, epsilon=1e-24)    # floors the squared norm


def contrastive_logits(query, positive, negatives, temperature):
    """Cosines over the temperature, the positive's in column 0 (MoCo v1, eq. 1).

    Args:
        query, positive: (B, C) unit rows; row i of `positive` is the key of query i.
        negatives: (K, C) unit rows, shared by all queries.
        temperature: > 0, divides the cosines.

    Returns:
        (B, 1 + K).
    """
    positive_logit = tf.einsum("bc,bc->b", query, positive)[:, None]
    negative_logits = tf.einsum("bc,kc->bk", query, negatives)
    return tf.concat([positive_logit, negative_logits], axis=1) / temperature


def in_batch_logits(query, keys, temperature):
    """Cosines over the temperature where the keys of the batch are positives and negatives alike (MoCo v3, alg. 1).

    Args:
        query: (N, C) unit rows.
        keys: (B, C) unit rows of all replicas, in rank order.
        temperature: > 0, divides the cosines.

    Returns:
        (N, B).
    """
    return tf.matmul(query, keys, transpose_b=True) / temperature


def info_nce(logits, positive=None):
    """InfoNCE (MoCo v1, eq. 1; MoCo v3, eq. 1): cross-entropy of each row's softmax against its positive.

    Args:
        logits: (N, K).
        positive: (N,) integers, the column of each row's positive; None: column 0.

    Returns:
        (N,) losses in nats; log(K) when all keys are alike.
    """
    return tf.nn.sparse_softmax_cross_entropy_with_logits(_columns(logits, positive), logits)


def positive_rank(logits, positive=None):
    """(N,) how many negatives score above the positive, as in `info_nce`: 0 is a right answer of the K-way task."""
    score = tf.gather(logits, _columns(logits, positive), axis=1, batch_dims=1)
    return tf.math.count_nonzero(logits > score[:, None], axis=1, dtype=tf.int32)


def _columns(logits, positive):
    return tf.zeros(logits.shape[0], tf.int32) if positive is None else positive
