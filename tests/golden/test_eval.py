"""The evaluations against the references': every run of kinds `knn` and `linear_probe`."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.evaluation.knn import knn_scores
from moco_tf.evaluation.metrics import top_k_accuracy
from moco_tf.evaluation.probe import Classifiers
from moco_tf.optim.sgd import SGD

from . import replay, weights


def rows_and_labels(run, tag):
    """The run's data, scaled as its settings say."""
    data = run.settings["data"]
    rows = run.file[data["x"]].astype(np.float64) / data["divide_by"]
    if data["l2_normalize"]:
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32).astype(replay.DTYPES[tag]), run.file[data["y"]].astype(np.int64)


@pytest.mark.parametrize("run", replay.runs("knn"), ids=lambda run: run.id)
@pytest.mark.parametrize("tag", sorted(replay.DTYPES))
def test_knn(run, tag):
    settings = run.settings
    (bank, queries), (bank_labels, wanted) = [[part[slice(*settings[key])] for key in ("bank_rows", "query_rows")]
                                              for part in rows_and_labels(run, tag)]
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


@pytest.mark.parametrize("ours", [0, 1])
@pytest.mark.parametrize(**replay.cases("linear_probe"))
def test_linear_probe(run, tag, ours):
    """The run is one of two cells of a grid; the other one has another learning rate and decay."""
    settings, dtype = run.settings, replay.DTYPES[tag]
    rows, labels = rows_and_labels(run, tag)
    start = settings["weight_scale"] * weights.draw(settings["weight_init"])
    rates, decays = np.full((2, 1), 0.3), np.full((2, 1), 0.1)
    decays[ours] = settings["optimizer"]["weight_decay"]
    with replay.precision(tag):
        optimizer = SGD(rates.astype(dtype), settings["optimizer"]["momentum"], decays.astype(dtype))
        cells = Classifiers(start.T.astype(np.float32).astype(dtype), 2, optimizer)
        step, real = tf.function(cells.step), np.ones(settings["batch_size"], bool)
        for number in range(settings["steps"]):
            rates[ours] = settings["lr"][number]
            optimizer.learning_rate.assign(rates.astype(dtype))
            here = slice(*(settings["first_row"] + settings["batch_size"] * np.array([number, number + 1])))
            right = cells.right(rows[here], labels[here])[ours] / settings["batch_size"]
            assert right == run[f"{tag}/acc"][number]
            loss = step(rows[here], labels[here], real)[ours]
            replay.check(run, tag, loss, run[f"{tag}/loss"][number], "loss")
            replay.check(run, tag, cells.biases[ours], run[f"{tag}/bias"][number], "bias")
            replay.check(run, tag, tf.norm(cells.weights[:, ours]), run[f"{tag}/w_norm"][number], "w_norm")
        rest = slice(*settings["rest_rows"])
        replay.check(run, tag, tf.transpose(cells.weights[:, ours]), run[f"{tag}/weight_final"], "weight_final")
        assert top_k_accuracy(cells.logits(rows[rest]).numpy()[:, ours], labels[rest]) == run[f"{tag}/rest_acc"]

