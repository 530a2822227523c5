"""Accuracies and confusion by hand, and against scikit-learn."""

import numpy as np
import pytest
from sklearn import metrics as sklearn

from moco_tf.evaluation.metrics import confusion_matrix, label_rank, summary, top_k_accuracy


def test_top_k_accuracy_counts_labels_among_the_best():
    scores = np.array([[3., 2., 1.], [1., 3., 2.], [1., 2., 3.], [0., 0., 1.]])
    assert top_k_accuracy(scores, [0, 0, 1, 1]) == 0.25
    assert top_k_accuracy(scores, [0, 0, 1, 1], k=2) == 0.5


def test_rank_is_the_place_in_the_stable_order():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (500, 7)).astype(np.float32), rng.integers(0, 7, 500)    # many ties
    order = np.argsort(-scores, axis=1, kind="stable")
    np.testing.assert_array_equal(label_rank(scores, labels), np.argmax(order == labels[:, None], axis=1))


def test_scores_that_are_no_numbers_are_never_right():
    scores = np.array([[np.nan, 1.], [np.nan, np.nan], [0., np.nan]])
    assert top_k_accuracy(scores, [0, 0, 0]) == 0


def test_summary_is_scikit_learns():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 8, 300)
    scores = rng.normal(size=(300, 8)) + 1.5 * np.eye(8)[labels]
    ours, predicted = summary(scores, labels), scores.argmax(axis=1)
    assert ours["top1"] == pytest.approx(sklearn.accuracy_score(labels, predicted))
    assert ours["top5"] == pytest.approx(sklearn.top_k_accuracy_score(labels, scores, k=5))
    np.testing.assert_array_equal(ours["confusion"], sklearn.confusion_matrix(labels, predicted))
    np.testing.assert_allclose(ours["per_class"], sklearn.recall_score(labels, predicted, average=None))


def test_a_class_without_rows_has_no_accuracy():
    assert summary(np.eye(3)[[0, 2]], [0, 2])["per_class"] == [1.0, None, 1.0]
    assert confusion_matrix([1, 1], [0, 1], 3).tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0]]
