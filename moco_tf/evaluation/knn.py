"""What unit rows tell about an encoder without training anything: nearest neighbours."""

import itertools
import math

import numpy as np
import tensorflow as tf

from moco_tf.losses import unit

QUERY_ROWS, BANK_ROWS = 1024, 8192    # at most, whose cosines are held at once: 32 MB in float32


def nearest(queries, blocks, k):
    """Each query's nearest rows of a bank that is seen once, block after block: exact, as one top-k over all of it.

    Besides a block, memory holds the queries and their k neighbours, however large the bank.

    Args:
        queries: (q, D) unit rows.
        blocks: of the bank, (n, D) unit rows each, all of one size but the last, which may be smaller.
        k: neighbours to find; all of the bank if it has fewer.

    Returns:
        (cosines (q, k), descending, of the dtype of `queries`; positions in the bank (q, k) int64), NumPy; of equally
        near rows the one that comes first in the bank stands first.
    """
    size = even_rows(len(queries), QUERY_ROWS)
    parts = [_filled(queries[i:i + size], size) for i in range(0, len(queries), size)]
    best = [(tf.fill([size, k], tf.constant(-math.inf, part.dtype)), tf.fill([size, k], tf.constant(-1, tf.int64)))
            for part in parts]
    seen = size_of_block = 0
    for block in blocks:
        size_of_block = size_of_block or len(block)
        count, block = len(block), _filled(block, size_of_block)
        start, end = tf.constant(seen, tf.int64), tf.constant(seen + count, tf.int64)
        best = [_nearer(part, block, start, end, *found) for part, found in zip(parts, best)]
        seen += count
    return tuple(np.concatenate([part.numpy() for part in column])[:len(queries), :seen] for column in zip(*best))


def even_rows(count, limit):
    """Rows of a block, at most `limit`, such that blocks of this size hold `count` rows with the least left over."""
    return -(-count // max(1, -(-count // limit)))


def _filled(rows, size):
    """Rows of zeros after them make static shapes, so that one graph serves all blocks."""
    rows = tf.convert_to_tensor(rows)
    return tf.pad(rows, [[0, size - rows.shape[0]], [0, 0]])


@tf.function
def _nearer(queries, block, start, end, cosines, positions):
    """The k best of those found so far and of the rows start .. end - 1 of the bank, which `block` begins with."""
    k, rows = positions.shape[1], start + tf.range(block.shape[0], dtype=tf.int64)
    new = tf.where(rows < end, tf.matmul(queries, block, transpose_b=True), tf.constant(-math.inf, queries.dtype))
    # top_k prefers what stands first: what was found before, and in it what came first in the bank.
    cosines, place = tf.math.top_k(tf.concat([cosines, new], axis=1), k)
    place = tf.cast(place, tf.int64)
    old = tf.gather(positions, tf.minimum(place, k - 1), axis=1, batch_dims=1)
    return cosines, tf.where(place < k, old, start + place - k)


def votes(cosines, labels, temperature, num_classes):
    """Weighted vote of neighbours (InstDisc, arXiv:1805.01978, sec. 3.4): each adds exp(cosine / temperature).

    Args:
        cosines: (q, k). labels: (q, k) of the neighbours, in 0 .. num_classes - 1.
        temperature: > 0.

    Returns:
        (q, num_classes) scores of the dtype of `cosines`.
    """
    rows = len(cosines)
    cells = tf.range(rows)[:, None] * num_classes + tf.cast(labels, tf.int32)
    weights = tf.exp(cosines / temperature)
    scores = tf.math.unsorted_segment_sum(tf.reshape(weights, [-1]), tf.reshape(cells, [-1]), rows * num_classes)
    return tf.reshape(scores, [rows, num_classes])


def knn_scores(bank, bank_labels, queries, k, temperature, num_classes):
    """`votes` of the k nearest rows of a bank in memory.

    Args:
        bank: (n, D) unit rows. queries: (q, D) unit rows.
        bank_labels: (n,) in 0 .. num_classes - 1.
        k: neighbours that vote; all of the bank if it has fewer.
        temperature: > 0.

    Returns:
        (q, num_classes) scores, NumPy, of the dtype of `bank`.
    """
    size = even_rows(len(bank), BANK_ROWS)
    cosines, positions = nearest(queries, (bank[i:i + size] for i in range(0, len(bank), size)), min(k, len(bank)))
    return votes(cosines, np.asarray(bank_labels)[positions], temperature, num_classes).numpy()


def view_retrieval(first, second):
    """How often the nearest neighbour of one view is the other view of the same image; mean of both directions.

    Args:
        first, second: (n, C) unit rows; row i of both shows image i. Chance is 1 / n.
    """
    cosine = np.asarray(first) @ np.asarray(second).T
    here = np.arange(len(cosine))
    return float(np.mean([np.mean(cosine.argmax(axis) == here) for axis in (0, 1)]))


def branch_retrieval(embeddings, branches):
    """How often the nearest neighbour of one branch's embedding is another branch's of the same image; mean of all
    pairs and of both directions of each.

    Args:
        embeddings: (n, branches * C), each branch's own side by side, of any norm. Chance is 1 / n.
        branches: 2 or more.
    """
    own = [unit(rows).numpy() for rows in tf.split(embeddings, branches, axis=1)]
    return float(np.mean([view_retrieval(first, second) for first, second in itertools.combinations(own, 2)]))
