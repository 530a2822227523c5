"""kNN against scikit-learn, and retrieval by its definition."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from moco_tf.evaluation.knn import knn_scores, top_k_accuracy, view_retrieval


def unit_rows(seed, count, width=16):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.1), (500, 0.5)])
def test_votes_are_those_of_scikit_learns_neighbours(k, temperature):
    bank, queries = unit_rows(0, 400), unit_rows(1, 90)
    labels = np.random.default_rng(2).integers(0, 5, 400)
    k = min(k, 400)
    distance, nearest = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(bank).kneighbors(queries)
    expected = np.zeros((90, 5))
    for row in range(90):
        np.add.at(expected[row], labels[nearest[row]], np.exp((1 - distance[row]) / temperature))
    np.testing.assert_allclose(knn_scores(bank, labels, queries, k, temperature, 5, chunk=32), expected, rtol=1e-9)


def test_top_k_accuracy_counts_labels_among_the_best():
    scores = np.array([[3., 2., 1.], [1., 3., 2.], [1., 2., 3.], [0., 0., 1.]])
    assert top_k_accuracy(scores, [0, 0, 1, 1]) == 0.25
    assert top_k_accuracy(scores, [0, 0, 1, 1], k=2) == 0.5


def test_view_retrieval():
    rows = unit_rows(0, 50)
    assert view_retrieval(rows, rows) == 1
    assert view_retrieval(rows, rows[::-1]) == 0
    half = rows.copy()
    half[:2] = half[1::-1]    # two of fifty are exchanged
    assert view_retrieval(rows, half) == pytest.approx(0.96)
