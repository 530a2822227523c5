"""Features in files: the rows they should be, found again, made anew after any change, and whole after a stop."""

import dataclasses
import json
import logging
import os
import shutil

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.data.sources import open_source
from moco_tf.errors import DataError, UsageError
from moco_tf.evaluation import features as module
from moco_tf.evaluation.features import Features, cached_features
from moco_tf.views.recipes import RECIPES

from tiny import tiny_encoder, write_splits

WHOLE = RECIPES["eval"](size=8, shorter_side=8)    # shows images of 8 x 8 as they are


@pytest.fixture(scope="module", autouse=True)
def small_shards():
    """Batches of 16 images, shards of 32 rows of 6 values: the 120 training images make four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BATCH", 16)
        patch.setattr(module, "SHARD_BYTES", 32 * 6 * 4)
        yield


@pytest.fixture
def encoder():
    return tiny_encoder()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Not to be changed."""
    return write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The rows of an undisturbed pass; not to be changed."""
    return rows_of(tiny_encoder(), images, tmp_path_factory.mktemp("whole"))


def rows_of(encoder, images, folder, features="backbone", recipe=WHOLE, **options):
    source = open_source("folder", str(images), "train")
    return cached_features(encoder, source, recipe, features, str(folder), {"path": "images"}, "images", **options)


def test_rows_are_the_encoders(encoder, images, whole, tmp_path):
    source = open_source("folder", str(images), "train")
    pixels = np.stack([tf.io.decode_png(tf.io.read_file(source.describe(i)), 3) for i in range(source.size)])
    assert (whole.count, whole.dim, whole.num_classes, whole.left_out) == (120, 6, 3, 0)
    np.testing.assert_allclose(whole.all(), encoder.rows(pixels), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(whole.index, np.arange(120))
    np.testing.assert_array_equal(whole.labels, np.repeat([0, 1, 2], 40))
    embeddings = rows_of(encoder, images, tmp_path, "embedding").all()
    np.testing.assert_allclose(embeddings, encoder.rows(pixels, "embedding"), rtol=1e-5, atol=1e-5)


def test_shards_are_read_in_pieces(whole):
    assert whole.shards == [32, 32, 32, 24]
    for size in (1, 7, 32, 50, 500):
        blocks = list(whole.blocks(size))
        assert {len(block) for block in blocks[:-1]} <= {size}
        np.testing.assert_array_equal(np.concatenate(blocks), whole.all())
    np.testing.assert_array_equal(whole.read(1, [(20, 3), (4, 1)]), whole.all()[[52, 53, 54, 36]])


def test_the_manifest_says_what_the_rows_are_of(encoder, whole):
    with open(os.path.join(whole.folder, "manifest.json")) as file:
        facts = json.load(file)["of"]
    assert facts["encoder"]["weights"] == encoder.fingerprint()
    assert facts["data"]["path"] == "images" and facts["data"]["images"] == 120


def test_what_is_there_is_not_computed_again(encoder, images, whole, monkeypatch):
    monkeypatch.setattr(module, "_write_shards", None)
    again = rows_of(encoder, images, os.path.dirname(whole.folder))
    assert again.folder == whole.folder


def test_any_change_makes_other_rows(encoder, images, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_write_shards", lambda *_: [120])    # the digest is looked at, not the rows
    monkeypatch.setattr(module, "Features", lambda folder: os.path.basename(folder))
    kernel = encoder.models["backbone"].weights[0]
    other = tmp_path / "images"
    shutil.copytree(images, other)

    def after(change, images=images, **options):
        change()
        return rows_of(options.pop("encoder", encoder), images, tmp_path / "cache", **options)

    def exchange():
        for name in ("000.png", "001.png"):
            shutil.copy(images / "val" / "class1" / name, other / "train" / "class1" / name)

    darker = dataclasses.replace(encoder, normalize=lambda images: encoder.normalize(images) - 0.1)
    digests = [
        os.path.basename(whole.folder),
        after(lambda: None, features="embedding"),
        after(lambda: None, recipe=RECIPES["eval"](size=8)),
        after(lambda: None, encoder=darker),
        after(lambda: (other / "train" / "class1" / "039.png").rename(other / "train" / "class2" / "040.png"), other),
        after(lambda: (other / "train" / "class2").rename(other / "train" / "class3"), other),
        after(lambda: kernel[0, 0].assign(np.nextafter(kernel[0, 0].numpy(), np.float32(9))))]    # its last bit
    assert after(lambda: kernel[0, 0].assign(tiny_encoder().models["backbone"].weights[0][0, 0])) == digests[0]
    monkeypatch.setattr(module, "SAMPLE", 120)    # all of the images
    digests += [after(lambda: None), after(exchange, other)]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("stop_at", [1, 4, 8])    # within a shard, between two, before the manifest
def test_a_stopped_pass_goes_on_after_its_last_whole_shard(stop_at, encoder, images, whole, tmp_path, monkeypatch):
    write, written = module._write, []

    def stopping(path, content):    # leaves half a file behind, as a kill does
        if len(written) == stop_at:
            with open(f"{path}.partial", "wb") as file:
                file.write(b"half")
            raise KeyboardInterrupt
        written.append(path)
        write(path, content)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_write", stopping)
        rows_of(encoder, images, tmp_path)
    kept = {path: os.stat(path).st_mtime_ns for path in written[:len(written) // 2 * 2]}    # two files make a shard
    rows = rows_of(encoder, images, tmp_path)
    np.testing.assert_array_equal(rows.all(), whole.all())
    np.testing.assert_array_equal(rows.labels, whole.labels)
    np.testing.assert_array_equal(rows.index, whole.index)
    assert {path: os.stat(path).st_mtime_ns for path in kept} == kept


def test_remote_folders_work(encoder, images, whole):
    remote = rows_of(encoder, images, "ram://features")
    np.testing.assert_array_equal(remote.all(), whole.all())
    np.testing.assert_array_equal(remote.read(2, [(5, 2)]), whole.all()[69:71])


def test_unreadable_images_are_left_out_up_to_a_limit(encoder, images, whole, tmp_path, caplog):
    shutil.copytree(images / "train", tmp_path / "train")
    broken = tmp_path / "train" / "class1" / "003.png"
    broken.write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        rows = rows_of(encoder, tmp_path, tmp_path / "cache", max_unreadable=0.01)
    assert broken.name in caplog.text
    assert (rows.count, rows.left_out, rows.shards) == (119, 1, [32, 31, 32, 24])
    np.testing.assert_array_equal(rows.index, np.delete(np.arange(120), 43))
    np.testing.assert_array_equal(rows.all(), np.delete(whole.all(), 43, axis=0))
    np.testing.assert_array_equal(np.concatenate(list(rows.blocks(20))), rows.all())
    with pytest.raises(DataError, match="003.png"):
        rows_of(encoder, tmp_path, tmp_path / "strict", max_unreadable=0.0)


def test_a_stream_goes_on_where_it_was_stopped(encoder, images, whole, tmp_path):
    from moco_tf.data import tools
    tools.pack(str(images), str(tmp_path / "records"), "train", shards=3)
    source = open_source("records", str(tmp_path / "records"), "train")

    def passed():
        return cached_features(encoder, source, WHOLE, "backbone", str(tmp_path / "cache"), {}, "images")

    rows = passed()
    first = rows.all(), rows.index, rows.labels
    np.testing.assert_allclose(first[0][np.argsort(rows.index)], whole.all(), rtol=1e-5, atol=1e-5)
    for name in ("manifest.json", "00002.npy", "00003.npy"):
        os.remove(os.path.join(rows.folder, name))
    rows = passed()
    for part, expected in zip((rows.all(), rows.index, rows.labels), first):
        np.testing.assert_array_equal(part, expected)


def test_features_that_are_not_finite_are_refused(encoder, images, tmp_path):
    encoder.models["backbone"].weights[1].assign([np.nan] + [0.0] * 5)
    with pytest.raises(DataError, match="000.png.*diverged"):
        rows_of(encoder, images, tmp_path)


def test_features_that_the_encoder_lacks_are_refused(encoder, images, tmp_path):
    with pytest.raises(UsageError, match="backbone, embedding"):
        rows_of(encoder, images, tmp_path, "pixels")


@pytest.mark.parametrize("damage", [lambda path: os.truncate(path, os.path.getsize(path) - 24), os.remove])
def test_a_damaged_shard_is_refused(damage, whole, tmp_path):
    shutil.copytree(whole.folder, tmp_path / "copy")
    damage(tmp_path / "copy" / "00002.npy")
    with pytest.raises(DataError, match="00002.npy"):
        Features(str(tmp_path / "copy")).all()


def test_a_folder_that_cannot_be_written_is_refused(encoder, images):
    with pytest.raises(UsageError, match="--cache"):
        rows_of(encoder, images, "/proc/features")
