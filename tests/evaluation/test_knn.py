"""kNN against scikit-learn, ties by exact arithmetic, and retrieval by its definition."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from moco_tf.evaluation import knn
from moco_tf.evaluation.knn import branch_retrieval, knn_scores, nearest, view_retrieval


def unit_rows(seed, count, width=16):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cut(rows, size):
    return (rows[i:i + size] for i in range(0, len(rows), size))


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (20, 0.1), (500, 0.5)])
def test_votes_are_those_of_scikit_learns_neighbours(k, temperature, monkeypatch):
    monkeypatch.setattr(knn, "QUERY_ROWS", 32)
    monkeypatch.setattr(knn, "BANK_ROWS", 150)
    bank, queries = unit_rows(0, 400), unit_rows(1, 90)
    labels = np.random.default_rng(2).integers(0, 5, 400)
    neighbours = min(k, 400)
    distance, found = NearestNeighbors(n_neighbors=neighbours, metric="cosine", algorithm="brute").fit(bank).kneighbors(
        queries)
    expected = np.zeros((90, 5))
    for row in range(90):
        np.add.at(expected[row], labels[found[row]], np.exp((1 - distance[row]) / temperature))
    np.testing.assert_allclose(knn_scores(bank, labels, queries, k, temperature, 5), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("size", [2000, 333, 64])
def test_neighbours_are_scikit_learns_among_rows_that_occur_several_times(size, dtype, tolerance):
    kinds = np.random.default_rng(3).integers(0, 700, 2000)    # 700 different rows, each about three times
    bank, queries = unit_rows(4, 700, 64)[kinds].astype(dtype), unit_rows(5, 300, 64).astype(dtype)
    exact = NearestNeighbors(n_neighbors=50, metric="cosine", algorithm="brute").fit(bank.astype(np.float64))
    distance, expected = exact.kneighbors(queries.astype(np.float64))
    cosines, positions = nearest(queries, cut(bank, size), 50)
    np.testing.assert_allclose(cosines, 1 - distance, atol=tolerance)
    # Which of equal rows scikit-learn names is left open, so kinds of rows are compared.
    np.testing.assert_array_equal(np.sort(kinds[positions]), np.sort(kinds[expected]))


@pytest.mark.parametrize("count, size, k", [(1000, 1000, 40), (1000, 7, 40), (1000, 128, 999), (30, 8, 40), (5, 9, 1)])
def test_of_equally_near_rows_the_first_in_the_bank_comes_first(count, size, k):
    rng = np.random.default_rng(6)
    bank, queries = (rng.choice([-0.125, 0.125], (n, 64)).astype(np.float32) for n in (count, 50))    # no rounding
    exact = queries @ bank.T
    expected = np.argsort(-exact, axis=1, kind="stable")[:, :k]
    cosines, positions = nearest(queries, cut(bank, size), k)
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_array_equal(cosines, np.take_along_axis(exact, expected, axis=1))


def test_one_graph_serves_all_blocks():
    bank, queries = unit_rows(7, 500, 24), unit_rows(8, 30, 24)
    nearest(queries, cut(bank, 60), 5)
    before = knn._nearer.experimental_get_tracing_count()
    nearest(queries, cut(np.concatenate([bank, bank]), 60), 5)
    assert knn._nearer.experimental_get_tracing_count() == before


def test_blocks_of_a_bank_are_even():
    assert [knn.even_rows(count, 100) for count in (1, 100, 101, 250, 1000)] == [1, 100, 51, 84, 100]


def test_view_retrieval():
    rows = unit_rows(0, 50)
    assert view_retrieval(rows, rows) == 1
    assert view_retrieval(rows, rows[::-1]) == 0
    half = rows.copy()
    half[:2] = half[1::-1]    # two of fifty are exchanged
    assert view_retrieval(rows, half) == pytest.approx(0.96)


def test_branch_retrieval_is_the_mean_over_pairs_of_branches():
    """Each branch has rows of its own norm; the second one is as the first, and the third finds nothing."""
    rows = unit_rows(0, 50)
    assert branch_retrieval(np.concatenate([rows, 3 * rows], axis=1), 2) == 1
    three = np.concatenate([rows, 3 * rows, 0.1 * rows[::-1]], axis=1)
    assert branch_retrieval(three, 3) == pytest.approx(1 / 3)
