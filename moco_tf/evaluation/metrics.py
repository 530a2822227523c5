"""What scores say of a classification: accuracies and the confusion matrix. NumPy in, plain Python out."""

import numpy as np


def label_rank(scores, labels):
    """(n,) how many classes stand before the right one: 0 is a right answer; ties go to the lower class.

    A score that is not a number stands before the right class, and the right class of such a score is the last.

    Args:
        scores: (n, C); the highest is the prediction.
        labels: (n,) in 0 .. C - 1.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)[:, None]
    own = np.take_along_axis(scores, labels, axis=1)
    behind = (scores < own) | ((scores == own) & (np.arange(scores.shape[1]) >= labels))    # counts the class itself
    return scores.shape[1] - np.count_nonzero(behind, axis=1)


def top_k_accuracy(scores, labels, k=1):
    """Share of the rows whose label is among the k highest scores; arguments as of `label_rank`."""
    return float(np.mean(label_rank(scores, labels) < k))


def confusion_matrix(predicted, labels, num_classes):
    """(C, C) int64: [i, j] counts the rows of class i that were taken for class j."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
    return np.bincount(cells, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def summary(scores, labels):
    """{"top1", "top5", "confusion": C lists of C counts, "per_class": C accuracies, None where a class has no row}.

    Args:
        scores: (n, C), logits for example.
        labels: (n,) in 0 .. C - 1.
    """
    num_classes = np.shape(scores)[1]
    rank = label_rank(scores, labels)
    confusion = confusion_matrix(np.argmax(scores, axis=1), labels, num_classes)
    per_class = [float(row[i] / row.sum()) if row.sum() else None for i, row in enumerate(confusion)]
    return {"top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5)), "confusion": confusion.tolist(),
            "per_class": per_class}
