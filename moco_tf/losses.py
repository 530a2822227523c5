"""Unit rows in, losses in nats out: no state, no strategy. At least float32 whatever comes in."""

import math

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


def bank_logits(query, rows, temperature):
    """Dot products over the temperature with rows of each query's own, the positive in column 0.

    Args:
        query: (N, C) unit rows.
        rows: (N, 1 + K, C), of a memory bank.
        temperature: > 0, divides the products.

    Returns:
        (N, 1 + K).
    """
    return tf.einsum("nc,nkc->nk", query, rows) / temperature


def info_nce(logits, positive=None):
    """InfoNCE (MoCo v1, eq. 1; MoCo v3, eq. 1): cross-entropy of each row's softmax against its positive.

    Args:
        logits: (N, K).
        positive: (N,) integers, the column of each row's positive; None: column 0.

    Returns:
        (N,) losses in nats; log(K) when all keys are alike.
    """
    return tf.nn.sparse_softmax_cross_entropy_with_logits(_columns(logits, positive), logits)


def nce(logits, partition, size, epsilon=1e-7):
    """Noise-contrastive estimation (arXiv:1805.01978, sec. 3.2): is a row the query's own, or noise?

    P = exp(logit) / Z is the model's probability of a row, 1 / n the noise's; a query's loss is
    -log[P_0 / (P_0 + K/n + eps)] - sum_j log[(K/n) / (P_j + K/n + eps)] over its K negatives j. Computed from log P, so
    that no exponential overflows.

    Args:
        logits: (N, 1 + K), the positive in column 0.
        partition: Z > 0, a scalar; no gradient flows through it.
        size: n, the number of training images.
        epsilon: eps, as in the reference.

    Returns:
        (N,) losses in nats; log(K + 1) + K log(1 + 1/K), about log(K) + 1, where every P is 1 / n.
    """
    noise = (logits.shape[1] - 1) / size
    log_p = logits - tf.math.log(tf.stop_gradient(partition))
    log_rest = math.log(noise + epsilon)
    positive = tf.math.softplus(log_rest - log_p[:, 0])
    negatives = tf.math.softplus(log_p[:, 1:] - log_rest) + math.log1p(epsilon / noise)
    return positive + tf.reduce_sum(negatives, axis=1)


def estimated_partition(logits, size):
    """Z from a batch: n times the mean of exp(logit) over all entries, the positives' among them; a scalar."""
    return size * tf.reduce_mean(tf.exp(tf.stop_gradient(logits)))


def followed_partition(partition, estimate, momentum):
    """The Z to use: `estimate` while `partition` is unset (< 0); then momentum * partition + (1 - momentum) * estimate.

    Momentum 1 keeps the first estimate for good, as the reference does.
    """
    return tf.where(partition < 0, estimate, momentum * partition + (1.0 - momentum) * estimate)


def random_partition(size, dim, temperature):
    """Z of a bank of random rows and unit features: n exp(1 / (2 C T^2)), as products then have variance 1 / C."""
    return size * math.exp(1 / (2 * dim * temperature ** 2))


def positive_rank(logits, positive=None):
    """(N,) how many negatives score above the positive, as in `info_nce`: 0 is a right answer of the K-way task."""
    score = tf.gather(logits, _columns(logits, positive), axis=1, batch_dims=1)
    return tf.math.count_nonzero(logits > score[:, None], axis=1, dtype=tf.int32)


def _columns(logits, positive):
    return tf.zeros(logits.shape[0], tf.int32) if positive is None else positive
