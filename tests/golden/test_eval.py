"""The kNN classifier against the reference's votes: every run of kind `knn`. (No linear probe here yet.)"""

import numpy as np
import pytest

from moco_tf.evaluation.knn import knn_scores, top_k_accuracy

from . import replay


@pytest.mark.parametrize("run", replay.runs("knn"), ids=lambda run: run.id)
@pytest.mark.parametrize("tag", sorted(replay.DTYPES))
def test_knn(run, tag):
    settings, data = run.settings, run.settings["data"]
    rows = run.file[data["x"]].astype(np.float64) / data["divide_by"]
    if data["l2_normalize"]:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    rows, labels = rows.astype(np.float32).astype(replay.DTYPES[tag]), run.file[data["y"]]
    (bank, queries), (bank_labels, wanted) = [[part[slice(*settings[key])] for key in ("bank_rows", "query_rows")]
                                              for part in (rows, labels)]
    scores = knn_scores(bank, bank_labels, queries, settings["k"], settings["temperature"], settings["classes"])

    # A neighbour at rank k may swap with the next one where they are as good as equally near.
    similarities = np.sort(queries.astype(np.float64) @ bank.T.astype(np.float64))[:, ::-1]
    k, tolerance = settings["k"], settings["tolerance"]
    clear = similarities[:, k - 1] - similarities[:, k] > tolerance["tie"]
    replay.check(run, tag, scores[clear], run["scores"][clear], "scores", tolerance["scores"])
    certain = clear & _apart(run["scores"], 1, tolerance["scores"])
    assert certain.mean() > 0.95
    np.testing.assert_array_equal(scores.argmax(1)[certain], run["pred"][certain])
    for best in (1, 5):
        open_ties = 1 - np.mean(clear & _apart(run["scores"], best, tolerance["scores"]))
        assert abs(top_k_accuracy(scores, wanted, best) - run[f"top{best}"]) <= open_ties


def _apart(scores, best, tolerance):
    """Which rows have their `best` highest scores clear of the next one; with few neighbours many classes tie at 0."""
    ranked = np.sort(scores)[:, ::-1]
    return ranked[:, best - 1] - ranked[:, best] > tolerance * ranked[:, 0]
