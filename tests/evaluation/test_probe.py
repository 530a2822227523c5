"""The grid of linear classifiers against the same sums in NumPy; what is picked, by what, and what is refused."""

import copy
import json

import numpy as np
import pytest

from moco_tf.errors import DataError, DivergedError, UsageError
from moco_tf.evaluation import probe
from moco_tf.evaluation.metrics import summary
from moco_tf.evaluation.probe import fast_probe, selection_part
from moco_tf.evaluation.splits import cached_splits

from tiny import config_of, tiny_encoder, write_splits


ENCODER = tiny_encoder()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    images = write_splits(tmp_path_factory.mktemp("images"))
    return cached_splits(ENCODER, config_of(images), "backbone", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def splits(opened, monkeypatch):
    """The features of 120 training and 60 held-out images, which the probe gets to see."""
    own = [copy.copy(rows) for rows in opened]
    monkeypatch.setattr(probe, "cached_splits", lambda *_: own)
    return own


def probed(**values):
    return fast_probe(ENCODER, config_of("", **{f"fast.{key}": value for key, value in values.items()}))


def softmax_regression(rows, labels, batches, lr, decay):
    """SGD as PyTorch's formula has it, in float64 (weights (D, C), biases (C,)), and the last epoch's mean loss."""
    weights = np.random.default_rng(0).normal(0, 0.01, (rows.shape[1], 3))
    biases, velocity, speed, step, total = np.zeros(3), 0.0, 0.0, 0, sum(map(len, batches))
    for epoch in batches:
        losses = []
        for batch in epoch:
            x, onehot = rows[batch], np.eye(3)[labels[batch]]
            logits = x @ weights + biases
            share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            losses.append(-np.log((share * onehot).sum(axis=1)).mean())
            rate = lr * 0.5 * (1 + np.cos(np.pi * step / total))
            velocity = 0.9 * velocity + x.T @ (share - onehot) / len(x) + decay * weights
            speed = 0.9 * speed + (share - onehot).mean(axis=0) + decay * biases
            weights, biases, step = weights - rate * velocity, biases - rate * speed, step + 1
    return weights, biases, np.mean(losses)


def order_of(keep, size, epochs):
    """The batches of each epoch as the probe draws them for seed 0: lists of positions, the last one shorter."""
    epochs = [np.random.default_rng([0, epoch]).permutation(np.flatnonzero(keep)) for epoch in range(epochs)]
    return [[order[i:i + size] for i in range(0, len(order), size)] for order in epochs]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_every_cell_is_a_classifier_trained_by_itself(batch_norm, splits):
    train, test = splits
    results = probed(lrs=(0.01, 0.1), weight_decays=(0.0, 0.1), holdout=0.3, batch_norm=batch_norm)
    rows, tested = train.all().astype(np.float64), test.all().astype(np.float64)
    if batch_norm:
        mean, deviation = rows.mean(axis=0), np.sqrt(rows.var(axis=0) + 1e-5)
        rows, tested = (rows - mean) / deviation, (tested - mean) / deviation
    apart = selection_part(train.labels, 0.3, 0)
    assert apart.sum() == results["selection_images"] == 36
    for cell in results["grid"]:
        weights, biases, loss = softmax_regression(rows, train.labels, order_of(~apart, 16, 5), cell["lr"],
                                                   cell["weight_decay"])
        assert cell["loss"] == pytest.approx(loss, rel=1e-4)
        right = np.argmax(rows[apart] @ weights + biases, axis=1) == train.labels[apart]
        assert cell["selection_top1"] == pytest.approx(right.mean())
    assert results["chosen"] == max(results["grid"], key=lambda cell: cell["selection_top1"])
    weights, biases, _ = softmax_regression(rows, train.labels, order_of(np.ones(120, bool), 16, 5),
                                            results["chosen"]["lr"], results["chosen"]["weight_decay"])
    expected = summary(tested @ weights + biases, test.labels)
    assert {name: results[name] for name in expected} == expected
    json.dumps(results)


def test_a_stream_gives_each_row_once_and_depends_on_the_seed_only(splits, monkeypatch):
    rows, keep = splits[0], np.arange(120) % 7 != 0
    monkeypatch.setattr(probe, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(probe, "SPAN_BYTES", 3 * 24)     # three rows of six values
    monkeypatch.setattr(probe, "MIXED_BYTES", 30 * 24)

    def drawn(seed):
        passed = list(probe._Rows(rows).batches(keep, 16, np.random.default_rng(seed)))
        assert len(passed) > 3    # so that groups were joined
        picked = [(part.numpy()[order.numpy()], labels.numpy()[order.numpy()], real.numpy())
                  for part, labels, order, real in passed]
        return [np.concatenate(column) for column in zip(*picked)]

    batches, labels, real = drawn(0)
    assert batches.shape == (7, 16, 6) and real.sum() == keep.sum() == 102 and real[:-1].all()
    seen, expected = batches[real], rows.all()[keep]
    np.testing.assert_array_equal(np.sort(seen, axis=0), np.sort(expected, axis=0))
    order = [np.flatnonzero((rows.all() == row).all(axis=1))[0] for row in seen]
    np.testing.assert_array_equal(rows.labels[order], labels[real])
    assert np.abs(np.diff(order)).mean() > 10    # neighbours are torn apart
    np.testing.assert_array_equal(drawn(0)[0], batches)
    assert not np.array_equal(drawn(1)[0], batches)


def test_streamed_features_train_as_well(monkeypatch):
    resident = probed(epochs=40)
    monkeypatch.setattr(probe, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(probe, "SPAN_BYTES", 3 * 24)
    monkeypatch.setattr(probe, "MIXED_BYTES", 30 * 24)
    streamed = probed(epochs=40)
    assert streamed == probed(epochs=40)
    assert resident["top1"] > 0.8 and abs(streamed["top1"] - resident["top1"]) < 0.1
    losses = [[cell["loss"] for cell in results["grid"] if cell["lr"] == 0.01] for results in (resident, streamed)]
    np.testing.assert_allclose(*losses, rtol=0.05)


def test_the_held_out_images_take_no_part_in_the_choice(splits):
    honest = probed()
    splits[1].labels = (splits[1].labels + 1) % 3
    other = probed()
    assert other["top1"] != honest["top1"]
    assert (other["grid"], other["chosen"]) == (honest["grid"], honest["chosen"])


@pytest.mark.parametrize("share", [0.01, 0.1, 0.9, 0.999])
def test_selection_takes_a_share_of_each_class_and_leaves_some(share):
    labels = np.repeat([0, 1, 2, 3], [1, 2, 10, 1000])
    chosen = selection_part(labels, share, seed=0)
    counts = np.bincount(labels[chosen], minlength=4)
    np.testing.assert_array_equal(counts, [0, 1, min(max(round(10 * share), 1), 9), round(1000 * share)])
    np.testing.assert_array_equal(selection_part(labels, share, seed=0), chosen)
    assert not np.array_equal(selection_part(labels, share, seed=1), chosen)


def test_classes_of_one_image_cannot_be_picked_by():
    with pytest.raises(DataError, match="two training images"):
        selection_part(np.arange(5), 0.1, 0)


def test_a_cell_that_diverges_is_reported_and_never_chosen():
    results = probed(lrs=(0.1, 1e38), weight_decays=(0.0,))
    assert results["grid"][1] == {"lr": 1e38, "weight_decay": 0.0, "selection_top1": None, "loss": None}
    assert results["chosen"]["lr"] == 0.1
    assert "diverged" in probe.table(results) and "end of the grid" in probe.table(results)
    with pytest.raises(DivergedError, match="lower"):
        probed(lrs=(1e38,))


@pytest.mark.parametrize("values, word", [
    ({"lrs": (0.0, 1.0)}, "lrs"), ({"weight_decays": (-1.0,)}, "weight_decays"), ({"lrs": ()}, "lrs"),
    ({"epochs": 0}, "epochs"), ({"holdout": 1.0}, "holdout")])
def test_wrong_grids_are_refused(values, word):
    with pytest.raises(UsageError, match=word):
        probed(**values)


def test_statistics_of_blocks_are_those_of_all(splits, monkeypatch):
    monkeypatch.setattr(probe, "SCORED_ROWS", 2)
    rows = splits[0]
    mean, deviation = probe._statistics(rows)
    np.testing.assert_allclose(mean, rows.all().astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(deviation, np.sqrt(rows.all().astype(np.float64).var(axis=0) + 1e-5), rtol=1e-6)
