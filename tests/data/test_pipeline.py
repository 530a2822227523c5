"""The pipeline: what batch t holds depends on (seed, t) alone; keys come shuffled; unreadable images are replaced."""

import logging
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.data.pipeline import Unreadable, evaluation_batches, training_batches
from moco_tf.data.sources import open_source
from moco_tf.errors import DataError
from moco_tf.views.recipes import RECIPES

BATCH, GROUP, PER_EPOCH = 24, 4, 3


class Context:
    """Of one of several hosts, as tf.distribute would hand it in."""

    def __init__(self, hosts, host):
        self.num_input_pipelines, self.input_pipeline_id = hosts, host


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(2):
        (root / str(label)).mkdir()
        for i in range(40):
            pixels = rng.integers(0, 256, (20 + i % 7, 24 - i % 5, 3), np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{i:02d}.jpg")
    return str(root)


def source_of(kind, folder):
    return open_source("embedded") if kind == "embedded" else open_source("folder", path=folder)


def recipe():
    return RECIPES["quickstart"](size=12, xla=False)


def batches(source, count, **options):
    """The first `count` global batches from what each replica gets, keys beside their queries again."""
    replicas = options.get("replicas", 1)
    dataset = training_batches(source, recipe(), BATCH, PER_EPOCH, seed=5, bn_group_size=GROUP, **options)
    parts = list(dataset.take(count * replicas).as_numpy_iterator())
    joined = []
    for t in range(count):
        mine = parts[t * replicas:(t + 1) * replicas]
        whole = {name: np.concatenate([part[name] for part in mine]) for name in mine[0]}
        joined.append({**whole, "shuffled": whole["key"]})
    return joined


def in_order_of_queries(batch, first=0):
    return batch["key"][batch["key_position"] - first]


@pytest.mark.parametrize("kind", ["embedded", "folder"])
def test_a_batch_depends_on_seed_and_step_alone(kind, folder):
    source = source_of(kind, folder)
    expected = batches(source, 5, workers=1)
    for options in (dict(workers=8), dict(replicas=2), dict(replicas=3, workers=2)):
        for ours, theirs in zip(expected, batches(source, 5, **options)):
            for name in ours:
                np.testing.assert_array_equal(ours[name], theirs[name])
    resumed = batches(source, 2, first_step=3)
    for ours, theirs in zip(expected[3:], resumed):
        np.testing.assert_array_equal(ours["query"], theirs["query"])
        np.testing.assert_array_equal(ours["key"], theirs["key"])


@pytest.mark.parametrize("kind", ["embedded", "folder"])
def test_hosts_share_the_same_global_batches(kind, folder):
    source = source_of(kind, folder)
    expected = batches(source, 4)
    hosts = [batches(source, 4, context=Context(2, host)) for host in range(2)]
    for t, whole in enumerate(expected):
        here = BATCH // 2
        np.testing.assert_array_equal(whole["index"], np.concatenate([hosts[h][t]["index"] for h in range(2)]))
        np.testing.assert_array_equal(whole["query"], np.concatenate([hosts[h][t]["query"] for h in range(2)]))
        keys = np.concatenate([in_order_of_queries(hosts[h][t], first=h * here) for h in range(2)])
        np.testing.assert_array_equal(in_order_of_queries(whole), keys)


def test_every_epoch_has_each_image_once_in_an_order_of_its_own(folder):
    source = source_of("folder", folder)
    seen = np.stack([batch["index"] for batch in batches(source, 2 * PER_EPOCH)]).reshape(2, -1)
    for epoch in seen:
        assert len(set(epoch)) == PER_EPOCH * BATCH
    assert not np.array_equal(*seen)


def test_keys_are_shuffled_over_the_groups_and_positions_lead_back():
    source = open_source("embedded")
    plain = batches(source, 3, shuffle=False)
    for shuffled, unshuffled in zip(batches(source, 3), plain):
        np.testing.assert_array_equal(in_order_of_queries(shuffled), unshuffled["key"])
        np.testing.assert_array_equal(unshuffled["key_position"], np.arange(BATCH))
        where = np.argsort(shuffled["key_position"])    # which image's key stands at each place
        groups = [set(part) for part in where.reshape(-1, GROUP)]
        assert all(group != set(range(i, i + GROUP)) for group in groups for i in range(0, BATCH, GROUP))


def test_query_and_key_are_different_views_of_the_same_image():
    batch = batches(open_source("embedded"), 1)[0]
    keys = in_order_of_queries(batch)
    assert (batch["query"] != keys).any(axis=(1, 2, 3)).all()


def test_unreadable_images_are_logged_by_path_and_replaced_by_the_next_of_the_batch(folder, tmp_path, caplog):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for name in ("0/03.jpg", "1/07.jpg"):
        (broken / name).write_bytes((broken / name).read_bytes()[:300])
    source = open_source("folder", path=str(broken))
    unreadable = Unreadable(source, limit=0.05)
    with caplog.at_level(logging.WARNING):
        ours = batches(source, PER_EPOCH * 2, unreadable=unreadable)
    names = [str(broken / name) for name in ("0/03.jpg", "1/07.jpg")]
    assert sorted(unreadable.seen) == [3, 47]
    assert all(sum(name in record.getMessage() for record in caplog.records) == 1 for name in names)
    whole = batches(open_source("folder", path=folder), PER_EPOCH * 2)
    for batch, reference in zip(ours, whole):
        bad = np.isin(reference["index"], [3, 47])
        np.testing.assert_array_equal(batch["query"][~bad], reference["query"][~bad])
        for row in np.flatnonzero(bad):
            following = next(r % BATCH for r in range(row + 1, row + BATCH) if not bad[r % BATCH])
            np.testing.assert_array_equal(batch["query"][row], reference["query"][following])


def test_too_many_unreadable_images_end_the_run(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    for path in sorted(broken.glob("0/*.jpg"))[:10]:
        path.write_bytes(b"not an image")
    source = open_source("folder", path=str(broken))
    unreadable = Unreadable(source, limit=0.05)
    with pytest.raises(tf.errors.OpError):
        batches(source, PER_EPOCH, unreadable=unreadable)
    error = unreadable.over_limit()
    assert isinstance(error, DataError) and "5.0%" in str(error) and "0/" in str(error)


def test_evaluation_marks_what_fills_up_the_last_batch_and_what_cannot_be_read(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "1/39.jpg").write_bytes(b"")
    source = open_source("folder", path=str(broken))
    parts = list(evaluation_batches(source, RECIPES["eval"](size=12), 32).as_numpy_iterator())
    real = np.concatenate([part[3] for part in parts])
    index = np.concatenate([part[2] for part in parts])[real]
    label = np.concatenate([part[1] for part in parts])[real]
    assert [len(part[1]) for part in parts] == [32, 32, 32]
    np.testing.assert_array_equal(index, np.arange(79))
    np.testing.assert_array_equal(label, np.arange(79) // 40)


def labelled(source, per_epoch, count, **options):
    dataset = training_batches(source, RECIPES["train_linear"](size=8, xla=False), BATCH, per_epoch, seed=5, labels=True,
                               **options)
    return list(dataset.take(count * options.get("replicas", 1)).as_numpy_iterator())


def test_the_last_batch_of_a_pass_is_filled_up_with_rows_that_do_not_count(folder):
    source = source_of("folder", folder)    # 80 images: three batches of 24, and 8 left
    batches = labelled(source, 4, 8)
    for epoch in (batches[:4], batches[4:]):
        counted = np.concatenate([batch["index"][batch["weight"] > 0] for batch in epoch])
        assert sorted(counted) == list(range(80))
        np.testing.assert_array_equal(epoch[0]["weight"], np.ones(BATCH, np.float32))
        np.testing.assert_array_equal(epoch[3]["weight"], [3.0] * 8 + [0.0] * 16)    # 24 / 8: the mean over real rows
    assert set(batches[0]) == {"image", "index", "label", "weight"}
    np.testing.assert_array_equal(batches[0]["label"], batches[0]["index"] // 40)
    for first in (2, 3, 5):
        for resumed, whole in zip(labelled(source, 4, 8 - first, first_step=first), batches[first:]):
            for name, value in whole.items():
                np.testing.assert_array_equal(resumed[name], value)


def test_repeated_augmentation_draws_each_image_three_times_in_a_row(folder):
    source = source_of("folder", folder)
    batches = labelled(source, 3, 6, repeats=3)
    for epoch in (batches[:3], batches[3:]):
        index = np.concatenate([batch["index"] for batch in epoch]).reshape(-1, 3)
        assert (index == index[:, :1]).all() and len(set(index[:, 0])) == 24
        images = np.concatenate([batch["image"] for batch in epoch]).reshape(24, 3, -1)
        assert (images[:, 0] != images[:, 1]).any(axis=1).all()    # each time another view
    resumed = labelled(source, 3, 4, repeats=3, first_step=2)
    for ours, whole in zip(resumed, batches[2:]):
        np.testing.assert_array_equal(ours["image"], whole["image"])
    shares = labelled(source, 3, 1, repeats=3, replicas=3)    # the three views of an image go to three replicas
    assert [sorted(share["index"]) for share in shares] == 3 * [sorted(set(batches[0]["index"]))]


def test_a_label_outside_the_range_stops_the_pipeline(folder):
    source = source_of("folder", folder)
    source.num_classes = 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="labels must be from 0 to"):
        labelled(source, 3, 1)
