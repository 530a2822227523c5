"""The pipeline: what batch t holds depends on (seed, t) alone; keys come shuffled; unreadable images are replaced."""

import logging
import shutil

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.data import pipeline, tools
from moco_tf.data.pipeline import Unreadable, evaluation_batches, image_seeds, partners_of, training_batches
from moco_tf.data.sources import open_source
from moco_tf.errors import DataError, UsageError
from moco_tf.views.image_mixture import MIXTURES
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


def batches(source, count, views=None, **options):
    """The first `count` global batches from what each replica gets, keys beside their queries again."""
    replicas = options.get("replicas", 1)
    dataset = training_batches(source, views or recipe(), BATCH, PER_EPOCH, seed=5, bn_group_size=GROUP, **options)
    parts = list(dataset.take(count * replicas).as_numpy_iterator())
    joined = []
    for t in range(count):
        mine = parts[t * replicas:(t + 1) * replicas]
        whole = {name: np.concatenate([part[name] for part in mine]) for name in mine[0]}
        joined.append(whole)
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
    evaluated = evaluation_batches(source, RECIPES["eval"](size=12), 32)
    parts = list(evaluated.as_numpy_iterator())
    assert len(evaluated) == len(parts)
    real = np.concatenate([part[3] for part in parts])
    index = np.concatenate([part[2] for part in parts])[real]
    label = np.concatenate([part[1] for part in parts])[real]
    assert [len(part[1]) for part in parts] == [32, 32, 32]
    np.testing.assert_array_equal(index, np.arange(79))
    np.testing.assert_array_equal(label, np.arange(79) // 40)


def test_images_that_take_more_than_one_operation_to_read_are_read(tmp_path):
    """Of BMP and of GIF with several pictures, beside a PNG with a palette."""
    rng, frames = np.random.default_rng(0), []
    for _ in range(4):
        frames.append(Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)))
    frames[0].save(tmp_path / "a.bmp")
    frames[1].quantize(16).save(tmp_path / "b.gif", save_all=True, append_images=[frames[2].quantize(16)])
    frames[3].quantize(8).save(tmp_path / "c.png")
    source, views = open_source("folder", path=str(tmp_path)), RECIPES["eval"](size=12)
    (drawn, _, index, real), = evaluation_batches(source, views, 3).as_numpy_iterator()
    assert real.all() and index.tolist() == [0, 1, 2]
    decoded = [source.decode(example)["image"] for example in source.examples()]
    np.testing.assert_array_equal(decoded[0], np.asarray(frames[0]))
    np.testing.assert_array_equal(decoded[2], np.asarray(frames[3].quantize(8).convert("RGB")))
    for row, image in zip(drawn["image"], decoded):
        np.testing.assert_array_equal(row, views.apply(image, tf.constant([0, 0]))["image"])


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


@pytest.mark.parametrize("cropped", [False, True])
def test_views_are_those_of_each_image_however_many_are_drawn_at_once(cropped, folder, monkeypatch):
    source, views = open_source("folder", path=folder), RECIPES["moco_v2"](size=12)
    views = views.crops() if cropped else views
    expected = batches(source, 1, views, shuffle=False)[0]
    by_index = {int(example["index"]): source.decode(example)["image"] for example in source.examples(5, 0).take(BATCH)}
    each = [views.apply(by_index[index], seed) for index, seed in zip(expected["index"], image_seeds(5, 0, BATCH))]
    for name in each[0]:
        np.testing.assert_array_equal(expected[name], np.stack([one[name] for one in each]))
    for at_once in (1, 7):      # 24 = 4 x 6
        monkeypatch.setattr(pipeline, "AT_ONCE", at_once)
        for name, values in batches(source, 1, views, shuffle=False)[0].items():
            np.testing.assert_array_equal(values, expected[name])


# Views normalised in the pipeline.

def test_views_may_leave_the_pipeline_normalized(folder):
    views = two_views()
    for source in (open_source("embedded"), open_source("folder", path=folder)):
        for levels, ready in zip(batches(source, 2, views), batches(source, 2, views.normalized())):
            for view in ("query", "key"):
                assert ready[view].dtype == np.float32
                np.testing.assert_allclose(ready[view], views.normalize(levels[view]), rtol=0, atol=1e-6)
            np.testing.assert_array_equal(levels["key_position"], ready["key_position"])


# Image mixtures.

@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """120 images of one level each, its index, as arrays: whatever a view is cut from, its pixels say of which image."""
    path = tmp_path_factory.mktemp("even") / "train.npy"
    np.save(path, np.broadcast_to(np.arange(120, dtype=np.uint8)[:, None, None, None], (120, 66, 65, 3)))
    return open_source("arrays", str(path))


def two_views():
    return RECIPES["cmc"](size=12, names=("query", "key"), xla=False)


@pytest.mark.parametrize("kind, mix", [
    ("embedded", MIXTURES["region"](r_prob=0.4)), ("folder", MIXTURES["global"](g_prob=0.4)),
    ("folder", MIXTURES["region"](r_prob=0.4, partners="batch")),
    pytest.param("folder", MIXTURES["im"](g_prob=0.4, r_prob=0.4), marks=pytest.mark.slow)],
    ids=["small", "large", "batch", "im"])
def test_mixed_batches_depend_on_seed_and_step_alone(kind, mix, folder):
    """Nor do hosts change them, except that partners of the batch are of the host's."""
    source, views = source_of(kind, folder), RECIPES["cmc"](size=12, xla=False).normalized()
    options = dict(views=views, mixture=mix)
    expected = batches(source, 4, workers=1, **options)
    for ours, theirs in zip(expected[1:], batches(source, 3, first_step=1, workers=4, replicas=2, **options)):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    if mix.partners == "data":
        host = batches(source, 2, context=Context(2, 1), **options)
        for whole, part in zip(expected, host):
            for name in ("query", "index"):
                np.testing.assert_array_equal(whole[name][BATCH // 2:], part[name])
    untouched = batches(source, 4, views)
    changed = np.mean([(a["query"] != b["query"]).any((1, 2, 3)) for a, b in zip(expected, untouched)])
    assert 0.45 < changed < 0.97      # 1 - 0.6^2 = 0.64, or of IM 1 - 0.6^4 = 0.87


def test_both_crops_share_partner_ratio_and_box(even):
    for mix in (MIXTURES["region"](r_prob=0.4), MIXTURES["global"](g_prob=0.4, partners="batch")):
        for batch in batches(even, 2, two_views(), mixture=mix):
            np.testing.assert_array_equal(in_order_of_queries(batch), batch["query"])
            assert (batch["query"] != batch["index"][:, None, None, None]).any((1, 2, 3)).mean() > 0.3


def pasted(batch):
    """For each row in which a region of another image is seen: (its own index, that of the other image)."""
    found = []
    for index, image in zip(batch["index"], batch["query"][..., 0]):
        others = set(np.unique(image)) - {index}
        found += [(index, other) for other in others]
    return found


def test_partners_are_any_images_of_the_data_or_of_the_batch(even):
    plain, rounds = two_views(), dict(r_num=1, r_prob=1.0)      # levels: the pixels name the image
    data, batch = (batches(even, 12, plain, mixture=MIXTURES["region"](partners=partners, **rounds))
                   for partners in ("data", "batch"))
    seen = [other for one in data for _, other in pasted(one)]
    outside = [other not in one["index"] for one in data for _, other in pasted(one)]
    assert len(seen) > 200 and len(set(seen)) > 85      # of 120: 1 - exp(-n / 120) of them, 98 for n = 205
    assert abs(np.mean(outside) - (1 - BATCH / 120)) < 0.1
    for one in batch:
        assert pasted(one) and all(other in one["index"] for _, other in pasted(one))
    mine = batches(even, 1, plain, mixture=MIXTURES["region"](partners="batch", **rounds), context=Context(2, 1))[0]
    assert len(mine["index"]) == BATCH // 2 and all(other in mine["index"] for _, other in pasted(mine))


def test_partners_are_augmented_afresh(folder):
    """Blended with itself from other crops, the only image of a folder is no longer what it was."""
    source = open_source("folder", path=folder + "/0")
    source.size = 1      # the first image alone
    before, after = (
        next(iter(training_batches(source, RECIPES["cmc"](size=12, xla=False), 4, 1, seed=5, mixture=mix)))["query"]
        for mix in (None, MIXTURES["global"](g_num=1, g_prob=1.0)))
    assert (before.numpy() != after.numpy()).any((1, 2, 3)).all()


def test_a_stream_takes_partners_from_the_batch(even, folder, tmp_path):
    tools.pack(folder + "/0", str(tmp_path))
    records, mix = open_source("records", str(tmp_path)), MIXTURES["im"]()
    assert (partners_of(mix, even), partners_of(mix, records)) == ("data", "batch")
    assert partners_of(MIXTURES["im"](partners="batch"), even) == "batch"
    assert partners_of(MIXTURES["cutout"](), records) == ""
    ours, same = (batches(records, 2, two_views().normalized(), mixture=MIXTURES["global"](partners=partners))
                  for partners in ("data", "batch"))
    for one, other in zip(ours, same):
        np.testing.assert_array_equal(one["query"], other["query"])


def test_a_partner_that_cannot_be_read_leaves_the_sample_as_it_is(tmp_path):
    for i in range(40):
        Image.fromarray(np.full((66, 70, 3), 200, np.uint8)).save(tmp_path / f"{i:02d}.png")
        if i % 4 == 0:
            (tmp_path / f"{i:02d}.png").write_bytes(b"")
    source = open_source("folder", path=str(tmp_path))
    for partners in ("data", "batch"):
        mix = MIXTURES["region"](r_prob=0.9, partners=partners)
        for batch in batches(source, 2, two_views(), mixture=mix, unreadable=Unreadable(source, limit=1.0)):
            assert set(np.unique(batch["query"])) == {200}


# Images of other numbers of channels.

@pytest.fixture(scope="module")
def depths(tmp_path_factory):
    """The same 30 images of RGB and depth as PNG files and as arrays."""
    root = tmp_path_factory.mktemp("depths")
    arrays = np.random.default_rng(0).integers(0, 256, (30, 70, 66, 4), np.uint8)
    (root / "png").mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array, "RGBA").save(root / "png" / f"{i:02d}.png")
    np.save(root / "train.npy", arrays)
    return [open_source("folder", str(root / "png"), channels=4),
            open_source("arrays", str(root / "train.npy"), channels=4)], arrays


def test_rgb_and_depth_from_files_and_arrays(depths):
    sources, arrays = depths
    constants = dict(mean=(0.5, 0.4, 0.3, 0.2), std=(0.25, 0.2, 0.3, 0.1))
    views = RECIPES["channels"](size=16, names=("query", "key"), xla=False, **constants)
    mix = MIXTURES["region"](r_prob=0.4)
    files, mapped = (batches(source, 2, views.normalized(), mixture=mix, replicas=2) for source in sources)
    for ours, theirs in zip(files, mapped):
        assert ours["query"].shape == (BATCH, 16, 16, 4) and ours["query"].dtype == np.float32
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    whole = RECIPES["channels"](size=70, crop_min=1.0, flip=0.0, xla=False, **constants)      # 70 x 66 stretched
    batch = next(iter(training_batches(sources[0], whole.normalized(), 4, 1, seed=0)))
    means = arrays.mean((1, 2))[batch["index"].numpy()] / 255.0
    np.testing.assert_allclose(tf.reduce_mean(batch["query"], [1, 2]), (means - constants["mean"]) / constants["std"],
                               atol=0.05)
    for source in sources:
        views, _, index, real = next(iter(evaluation_batches(source, RECIPES["eval"](size=64, shorter_side=66), 30)))
        np.testing.assert_array_equal(views["image"], arrays[:, 3:67, 1:65])
        assert real.numpy().all() and list(index) == list(range(30))


@pytest.mark.parametrize("options, xla", [
    (dict(g_prob=0.5, r_prob=0.5), False), pytest.param(dict(g_prob=0.5, r_prob=0.5), True, marks=pytest.mark.slow),
    pytest.param(dict(g_prob=0.0, r_prob=0.0), True, marks=pytest.mark.slow)])
def test_small_images_mixed_in_one_call_are_those_mixed_one_by_one(options, xla, tmp_path):
    """Files, whose sizes are not known, are mixed one by one, arrays a batch at once; XLA rounds otherwise."""
    arrays = np.random.default_rng(0).integers(0, 256, (30, 20, 16, 3), np.uint8)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / f"{i:02d}.png")
    np.save(tmp_path / "train.npy", arrays)
    sources = open_source("folder", str(tmp_path)), open_source("arrays", str(tmp_path / "train.npy"))
    mix = MIXTURES["im"](**options)
    views = [RECIPES["quickstart"](size=12, xla=compiled).normalized() for compiled in (False, xla)]
    one_by_one, at_once = (batches(source, 2, recipe, mixture=mix) for source, recipe in zip(sources, views))
    for ours, theirs in zip(at_once, one_by_one):
        for name in ours:
            if xla:    # a level, which is 0.011, now and then
                assert (np.abs(ours[name] - theirs[name]) > 1e-5).mean() < 0.01
            else:
                np.testing.assert_array_equal(ours[name], theirs[name])


def test_a_recipe_that_needs_rgb_refuses_other_images(depths):
    source = depths[0][0]
    with pytest.raises(UsageError, match="images of 3 channels. Received: 4 channels"):
        training_batches(source, recipe(), BATCH, PER_EPOCH, seed=0)
    with pytest.raises(UsageError, match="images of 3 channels. Received: 4 channels"):
        evaluation_batches(source, RECIPES["moco_v2"](), BATCH)
    four = RECIPES["channels"](mean=(0.5,) * 4, std=(0.5,) * 4)
    with pytest.raises(UsageError, match="images of 4 channels. Received: 3 channels"):
        training_batches(open_source("embedded"), four, BATCH, 1, seed=0)
