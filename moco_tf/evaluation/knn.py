"""What unit rows tell about an encoder without training anything: nearest neighbours."""

import numpy as np
import tensorflow as tf


def knn_scores(bank, bank_labels, queries, k, temperature, num_classes, chunk=256):
    """Weighted vote of the nearest neighbours (InstDisc, arXiv:1805.01978, sec. 3.4): each adds exp(cosine / temperature).

    Args:
        bank: (n, D) unit rows. queries: (q, D) unit rows.
        bank_labels: (n,) in 0 .. num_classes - 1.
        k: neighbours that vote; all of the bank if it has fewer.
        temperature: > 0.
        chunk: queries whose similarities to the whole bank are held at once.

    Returns:
        (q, num_classes) scores, NumPy, of the dtype of `bank`.
    """
    bank, labels = tf.convert_to_tensor(bank), tf.cast(bank_labels, tf.int32)
    parts = [_votes(tf.convert_to_tensor(queries[i:i + chunk]), bank, labels, tf.constant(temperature, bank.dtype),
                    k=min(k, bank.shape[0]), num_classes=num_classes) for i in range(0, len(queries), chunk)]
    return np.concatenate([part.numpy() for part in parts])


@tf.function(reduce_retracing=True)
def _votes(queries, bank, labels, temperature, k, num_classes):
    cosine, nearest = tf.math.top_k(tf.matmul(queries, bank, transpose_b=True), k)
    rows = tf.shape(queries)[0]
    cells = tf.range(rows)[:, None] * num_classes + tf.gather(labels, nearest)
    votes = tf.math.unsorted_segment_sum(tf.reshape(tf.exp(cosine / temperature), [-1]), tf.reshape(cells, [-1]),
                                         rows * num_classes)
    return tf.reshape(votes, [rows, num_classes])


def top_k_accuracy(scores, labels, k=1):
    """Share of rows whose label is among the k highest scores; ties go to the lower class."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float(np.mean(np.any(best == np.asarray(labels)[:, None], axis=1)))


def view_retrieval(first, second):
    """How often the nearest neighbour of one view is the other view of the same image; mean of both directions.

    Args:
        first, second: (n, C) unit rows; row i of both shows image i. Chance is 1 / n.
    """
    cosine = np.asarray(first) @ np.asarray(second).T
    here = np.arange(len(cosine))
    return float(np.mean([np.mean(cosine.argmax(axis) == here) for axis in (0, 1)]))
