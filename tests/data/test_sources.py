"""Sources: what comes out is what was put in, by index, once an epoch, in an order that seed and epoch decide."""

import hashlib
import io
import os
import re
import zipfile

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from moco_tf.data import decode, sources, tools
from moco_tf.data.embedded import make_fashion_mnist
from moco_tf.data.sources import has_split, open_source, split_holdout
from moco_tf.errors import DataError, UsageError

EMBEDDED = os.path.dirname(sources.SAMPLE)


def picture(height=40, width=50, seed=0):
    """A smooth picture: JPEG's and GIF's losses on it are small."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


def with_depth(height=40, width=50, seed=0):
    """(H, W, 4) uint8: a picture, and a fourth measurement that PNG calls alpha; it is 0 in places."""
    depth = np.asarray(picture(height, width, seed=seed + 100))[..., :1] // 64 * 64
    return np.concatenate([np.asarray(picture(height, width, seed=seed)), depth], axis=-1)


def encode(image, file_format, **options):
    content = io.BytesIO()
    image.save(content, file_format, **options)
    return content.getvalue()


def write(path, content):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of ten JPEGs in train/, two of two PNGs in validation/."""
    root = str(tmp_path_factory.mktemp("photos"))
    for label, name in enumerate(("ape", "bee", "cat")):
        for i in range(10):
            write(f"{root}/train/{name}/{i:02d}.jpg", encode(picture(seed=10 * label + i), "JPEG"))
    for name in ("ape", "bee"):
        for i in range(2):
            write(f"{root}/validation/{name}/{i}.png", encode(picture(seed=i), "PNG"))
    return root


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("packed"))
    tools.pack(photos, out, shards=5)
    return out


class TinyPhotos(tfds.core.GeneratorBasedBuilder):
    """Pictures of differing sizes, of two classes: 12 to train, 4 to test."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=["left", "right"]),
            "note": tfds.features.Text()}))

    def _split_generators(self, _):
        return {"train": self._generate_examples(12), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        for i in range(count):
            content = io.BytesIO(encode(picture(20 + i, 30, seed=i), "JPEG"))
            yield i, {"image": content, "label": i % 2, "note": str(i)}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    TinyPhotos(data_dir=data_dir).download_and_prepare()
    return data_dir


@pytest.fixture(params=["embedded", "folder", "records", "tfds"])
def any_source(request, photos, packed, prepared):
    return {
        "embedded": lambda: open_source("embedded", split="test"),
        "folder": lambda: open_source("folder", photos),
        "records": lambda: open_source("records", packed),
        "tfds": lambda: open_source("tfds", "tiny_photos", data_dir=prepared)}[request.param]()


def order(source, seed=None, epoch=0, start=0):
    """Indices of one epoch, asked for as the pipeline does: with tensors, inside flat_map."""
    def examples(epoch, start):
        return source.examples(seed, epoch, start)
    request = tf.data.Dataset.from_tensors((np.int64(epoch), np.int64(start)))
    return [int(example["index"]) for example in request.flat_map(examples).as_numpy_iterator()]


def decoded(source):
    """{index: (image, label)} of a whole source, decoded in a parallel map."""
    examples = source.examples().map(source.decode, tf.data.AUTOTUNE)
    return {int(e["index"]): (e["image"], int(e["label"])) for e in examples.as_numpy_iterator()}


# One epoch.

def test_an_epoch_has_every_index_once(any_source):
    for epoch in (0, 1):
        assert sorted(order(any_source, seed=3, epoch=epoch)) == list(range(any_source.size))


def test_order_depends_on_seed_and_epoch_alone(any_source):
    first = order(any_source, seed=3, epoch=1)
    tf.random.set_seed(0)    # a global seed must not count, and 0 is one that tf.data stumbles over
    assert order(any_source, seed=3, epoch=1) == first
    tf.random.set_seed(7)
    assert order(any_source, seed=3, epoch=1) == first
    assert order(any_source, seed=3, epoch=2) != first
    assert order(any_source, seed=4, epoch=1) != first
    assert [int(e["index"]) for e in any_source.examples(3, 1)] == first    # with a python int, eagerly


def test_start_leaves_out_the_first(any_source):
    shuffled, stored = order(any_source, seed=3, epoch=1), order(any_source)
    for start in (any_source.size - 2, any_source.size):
        assert order(any_source, seed=3, epoch=1, start=start) == shuffled[start:]
        assert order(any_source, start=start) == stored[start:]


def test_without_a_seed_random_access_is_in_index_order(photos):
    for source in (open_source("embedded", split="test"), open_source("folder", photos)):
        assert order(source) == list(range(source.size))


def test_all_orders_have_the_same_chance():
    """Chi-square of positions over 1000 permutations of six: 25 degrees of freedom, 0.999 quantile 52.6."""
    counts = np.zeros((6, 6))
    different = set()
    for epoch in range(1000):
        drawn = sources.permutation(6, sources.epoch_key(0, epoch)).numpy()
        counts[np.arange(6), drawn] += 1
        different.add(tuple(drawn))
    assert np.sum((counts - 1000 / 6) ** 2 / (1000 / 6)) < 52.6
    assert len(different) > 500    # of 720; 540 expected


def test_elements_have_the_promised_types(any_source):
    spec = any_source.examples(0, 0).map(any_source.decode).element_spec
    assert spec["image"].dtype == tf.uint8 and spec["image"].shape[-1] == 3
    if any_source.image_shape:
        assert tuple(spec["image"].shape) == any_source.image_shape
    assert spec["label"] == spec["index"] == tf.TensorSpec((), tf.int64)
    example = next(iter(any_source.examples(0, 0).map(any_source.decode)))
    assert example["image"].shape.rank == 3 and 0 <= example["label"] < any_source.num_classes
    assert len(any_source.class_names) == any_source.num_classes
    assert str(int(example["index"])) in any_source.describe(example["index"]) or any_source.random_access


# The embedded sample.

def test_embedded_sample_is_the_file_its_note_describes():
    with open(sources.SAMPLE, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    with open(os.path.join(EMBEDDED, "README.md"), encoding="utf-8") as file:
        note = file.read()
    assert digest in note
    assert "MIT" in note and all(name in note for name in ("arXiv:1708.07747", "dataset-fashion-mnist"))
    with open(os.path.join(EMBEDDED, "LICENSE"), encoding="utf-8") as file:
        assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in file.read()


def test_embedded_splits_have_grey_pixels_and_all_classes():
    for split, size in (("train", 10_000), ("test", 2_000), ("val", 2_000)):
        source = open_source("embedded", split=split)
        assert (source.size, source.num_classes, source.image_shape) == (size, 10, (28, 28, 3))
        assert set(source.labels()) == set(range(10))
    image = source.decode({"index": tf.constant(5, tf.int64)})["image"].numpy()
    assert np.ptp(image, axis=-1).max() == 0 and image.max() > 100
    np.testing.assert_array_equal(decode.decode_image(source.encoded({"index": tf.constant(5, tf.int64)})), image)


def test_embedded_labels_name_what_is_seen():
    """First training images of Fashion-MNIST, as its page shows them: ankle boot, T-shirt, T-shirt, dress, T-shirt."""
    source = open_source("embedded")
    assert [source.class_names[label] for label in source.labels()[:5]] == [
        "Ankle boot", "T-shirt/top", "T-shirt/top", "Dress", "T-shirt/top"]
    trousers, sandals = (source._images.numpy()[source.labels() == label] for label in (1, 5))
    assert (trousers > 0).mean(axis=0)[2, 14] > .9 > .1 > (sandals > 0).mean(axis=0)[2, 14]    # waistband; nothing


def test_the_sample_is_made_reproducibly(tmp_path):
    arrays = {"images": np.arange(24, dtype=np.uint8).reshape(2, 3, 4)}
    for name in ("a.npz", "b.npz"):
        make_fashion_mnist.write_npz(str(tmp_path / name), arrays)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    np.testing.assert_array_equal(np.load(tmp_path / "a.npz")["images"], arrays["images"])
    assert {entry.date_time[0] for entry in zipfile.ZipFile(sources.SAMPLE).infolist()} == {1980}


def test_embedded_refuses_a_path():
    with pytest.raises(UsageError, match="takes no path.*'/my/images'"):
        open_source("embedded", "/my/images")


# A folder.

def test_folder_reads_every_file_by_its_index(photos):
    source = open_source("folder", photos)
    assert (source.size, source.class_names, source.image_shape) == (30, ("ape", "bee", "cat"), None)
    np.testing.assert_array_equal(source.labels(), np.repeat([0, 1, 2], 10))
    for index, (image, label) in decoded(source).items():
        path = f"{photos}/train/{'ape bee cat'.split()[index // 10]}/{index % 10:02d}.jpg"
        assert source.describe(index) == path and label == index // 10
        np.testing.assert_array_equal(image, np.asarray(Image.open(path)))


def test_folder_takes_the_evaluation_split_by_any_of_its_names(photos):
    assert open_source("folder", photos, "val").size == open_source("folder", photos, "validation").size == 4
    assert has_split("folder", photos, "val") and not has_split("folder", photos, "test")
    with pytest.raises(DataError, match=r"split must be a folder in .*photos.*: test\."):
        open_source("folder", photos, "test")


def test_folder_without_classes_has_no_labels(tmp_path):
    def names_and_labels():
        source = open_source("folder", str(tmp_path))
        assert (source.num_classes, source.class_names, source.labels()) == (0, (), None)
        assert {label for _, label in decoded(source).values()} == {-1}
        return [os.path.relpath(source.describe(i), tmp_path) for i in range(source.size)]

    content = encode(picture(), "PNG")
    for name in ("b.PNG", "a.JpEg", "c.Gif", ".hidden.png", "notes.txt", "png"):
        write(str(tmp_path / name), content)
    assert names_and_labels() == ["a.JpEg", "b.PNG", "c.Gif"]
    write(str(tmp_path / "deep/deeper/d.bmp"), content)
    write(str(tmp_path / ".cache/e.bmp"), content)
    assert names_and_labels() == ["a.JpEg", "b.PNG", "c.Gif", "deep/deeper/d.bmp"]
    for name in "abc":    # one class tells nothing apart
        next(tmp_path.glob(f"{name}.*")).unlink()
    assert names_and_labels() == ["deep/deeper/d.bmp"]


def test_folder_keeps_only_the_classes_asked_for(photos):
    source = open_source("folder", photos, classes=("cat", "ape"))
    assert (source.size, source.class_names) == (20, ("ape", "cat"))
    assert "/cat/" in source.describe(10)
    with pytest.raises(DataError, match="1 of 2, first 'dog'"):
        open_source("folder", photos, classes=("cat", "dog"))


def test_labels_are_the_ranks_of_the_class_folders_names(tmp_path):
    # As paths, "ant-1/..." comes before "ant/..."; as names, "ant" comes first.
    for path in ("ant/0.png", "ant-1/0.png", "ant-1/deep/1.png", "ant0/0.png", "bee/0.png", "bee/1.png"):
        write(tmp_path / path, encode(picture(), "PNG"))
    source = open_source("folder", str(tmp_path))
    assert source.class_names == ("ant", "ant-1", "ant0", "bee")
    named = {os.path.relpath(source.describe(i), tmp_path): source.class_names[label] for i, label in enumerate(source.labels())}
    assert named == {path: path.partition("/")[0] for path in named} and len(named) == 6


def test_folder_on_a_remote_file_system():
    """TensorFlow's file system in memory stands in for gs://."""
    content = encode(picture(), "PNG")
    for name in ("train/b/1.png", "train/a/x/2.PNG", "train/a/3.png", "train/a/.4.png", "train/a/5.txt"):
        tf.io.gfile.makedirs(f"ram://photos/{os.path.dirname(name)}")
        with tf.io.gfile.GFile(f"ram://photos/{name}", "wb") as file:
            file.write(content)
    source = open_source("folder", "ram://photos")
    assert [source.describe(i) for i in range(source.size)] == [
        f"ram://photos/train/{name}" for name in ("a/3.png", "a/x/2.PNG", "b/1.png")]
    assert [label for _, label in decoded(source).values()] == [0, 0, 1]


def test_a_file_name_need_not_be_text(tmp_path):
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as file:
        file.write(encode(picture(), "PNG"))
    source = open_source("folder", str(tmp_path))
    assert len(decoded(source)) == 1 and "caf" in source.describe(0)


def test_wrong_paths_are_named(tmp_path):
    missing = str(tmp_path / "missing")
    for name in ("folder", "records"):
        with pytest.raises(DataError, match=re.escape(missing)):
            open_source(name, missing)
    with pytest.raises(DataError, match=r"\.jpg, \.jpeg, \.png, \.bmp, \.gif.*" + re.escape(str(tmp_path))):
        open_source("folder", str(tmp_path))
    for name in ("folder", "records", "tfds"):
        with pytest.raises(UsageError, match="needs a path"):
            open_source(name)
    with pytest.raises(UsageError, match="embedded, folder, records, tfds.*'foldr'.*mean 'folder'"):
        open_source("foldr", str(tmp_path))
    with pytest.raises(UsageError, match="'records' does not take classes"):
        open_source("records", str(tmp_path), classes=("a", "b"))


# Decoding.

LOSSLESS = [("PNG", mode) for mode in ("RGB", "L", "LA", "RGBA", "P", "1")] + [
    ("BMP", mode) for mode in ("RGB", "L", "P", "RGBA")] + [("GIF", mode) for mode in ("RGB", "L", "P")]


@pytest.mark.parametrize("file_format, mode", LOSSLESS + [("JPEG", mode) for mode in ("RGB", "L", "CMYK", "YCbCr")])
def test_decoding_agrees_with_pillow(file_format, mode):
    """JPEG too to the bit: both use libjpeg's exact integer transform, and both multiply CMYK by K."""
    content = encode(picture().convert(mode), file_format)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(tf.function(decode.decode_image)(tf.constant(content)), expected)


def test_sixteen_bits_are_cut_to_the_upper_eight():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    image = decode.decode_image(tf.constant(encode(Image.fromarray(grey * 256 + 77), "PNG")))
    np.testing.assert_array_equal(image, np.repeat(grey[..., None], 3, axis=-1))


def test_of_an_animation_the_first_frame_counts():
    first = picture().convert("P")
    content = encode(first, "GIF", save_all=True, append_images=[first.rotate(90), first.rotate(180)])
    np.testing.assert_array_equal(decode.decode_image(tf.constant(content)), np.asarray(first.convert("RGB")))


def test_progressive_jpeg_and_wrong_extension_do_not_matter(tmp_path):
    write(str(tmp_path / "really_jpeg.png"), encode(picture(), "JPEG", progressive=True))
    ((image, _),) = decoded(open_source("folder", str(tmp_path))).values()
    np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / "really_jpeg.png")))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "GIF"])
def test_cut_off_files_do_not_decode(file_format):
    content = encode(picture(), file_format)
    decode_in_graph = tf.function(decode.decode_image, input_signature=[tf.TensorSpec((), tf.string)])
    for length in (0, 1, 2, 10, len(content) // 2, len(content) * 9 // 10, len(content) - 2):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode_in_graph(tf.constant(content[:length]))


def test_foreign_bytes_do_not_decode():
    for content in (b"a text\n" * 50, encode(picture(), "TIFF"), b"BM" + bytes(200)):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode.decode_image(tf.constant(content))


# Records.

def test_records_are_the_folder_to_the_byte(photos, packed):
    folder, records = open_source("folder", photos), open_source("records", packed)
    assert (records.size, records.class_names, records.num_classes) == (30, folder.class_names, 3)
    assert records.image_shape == (40, 50, 3)    # all alike, so shapes are static
    seen = set()
    for example in records.examples():
        index = int(example["index"])
        with open(folder.describe(index), "rb") as file:
            assert example["encoded"].numpy() == file.read()
        assert example["label"] == folder.labels()[index]
        seen.add(index)
    assert seen == set(range(30))


def test_records_of_a_class_are_spread_over_shards(packed):
    """A folder is sorted by class; written so, what a buffer mixes would be of few classes."""
    shard = tf.data.TFRecordDataset(os.path.join(packed, "train-00000.tfrecord"))
    records = open_source("records", packed)
    assert len({int(records.parse(serialized)["label"]) for serialized in shard}) == 3


def test_records_need_the_note_and_all_shards(photos, tmp_path):
    out = str(tmp_path)
    tools.pack(photos, out, shards=3)
    assert has_split("records", out, "train") and not has_split("records", out, "val")
    os.remove(f"{out}/train-00001.tfrecord")
    with pytest.raises(DataError, match="Missing: 1, first train-00001.tfrecord"):
        open_source("records", out)
    os.remove(f"{out}/train.json")
    with pytest.raises(DataError, match="no finished pack of split 'train'"):
        open_source("records", out)
    (tmp_path / "train.json").write_text('{"something": "else"}')
    with pytest.raises(DataError, match="train.json must be as"):
        open_source("records", out)


# tensorflow-datasets.

def test_tfds_reads_a_prepared_data_set(prepared):
    source = open_source("tfds", "tiny_photos", data_dir=prepared)
    assert (source.size, source.class_names, source.image_shape) == (12, ("left", "right"), None)
    assert order(source) == list(range(12))
    stored = tfds.load("tiny_photos", split="train", data_dir=prepared, decoders={"image": tfds.decode.SkipDecoding()})
    images = decoded(source)
    for index, example in enumerate(stored.as_numpy_iterator()):
        image, label = images[index]
        assert label == example["label"]
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(example["image"]))))
    assert source.describe(3) == "tiny_photos train[3]"


def test_tfds_splits_and_slices(prepared):
    assert open_source("tfds", "tiny_photos", "val", prepared).size == 4    # what is there is called test
    assert open_source("tfds", "tiny_photos", "train[:75%]", prepared).size == 9
    assert not has_split("tfds", "tiny_photos", "unlabelled", prepared)
    with pytest.raises(DataError, match="train, test.*'unlabelled'"):
        open_source("tfds", "tiny_photos", "unlabelled", prepared)


def test_tfds_says_what_is_missing(prepared, tmp_path):
    with pytest.raises(DataError, match="tfds build tiny_photos.*data.download=True"):
        open_source("tfds", "tiny_photos", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="'no_such_data'"):
        open_source("tfds", "no_such_data", data_dir=str(tmp_path))
    with pytest.raises(DataError, match="named 'photo'.*image, label, note"):
        open_source("tfds", "tiny_photos", data_dir=prepared, feature="photo")
    source = open_source("tfds", "tiny_photos", data_dir=str(tmp_path), download=True)    # this one needs no network
    assert source.size == 12


def test_tfds_data_sets_by_name_through_its_mock():
    with tfds.testing.mock_data(num_examples=20):
        source = open_source("tfds", "fashion_mnist")
        assert (source.size, source.num_classes, source.image_shape) == (20, 10, (28, 28, 3))
        assert sorted(order(source, seed=0)) == list(range(20))
        images = decoded(source)
        assert images[0][0].shape == (28, 28, 3) and np.ptp(images[0][0], axis=-1).max() == 0
        without_labels = open_source("tfds", "div2k/bicubic_x2", feature="lr")
        assert without_labels.num_classes == 0
        assert {label for _, label in decoded(without_labels).values()} == {-1}


# Other numbers of channels.

@pytest.fixture(scope="module")
def depths(tmp_path_factory):
    """PNG files of RGB and depth, of two classes, packed too, and beside them as arrays."""
    root, arrays = tmp_path_factory.mktemp("depths"), np.stack([with_depth(seed=i) for i in range(6)])
    for i, array in enumerate(arrays):
        write(f"{root}/png/train/{'ab'[i // 3]}/{i}.png", encode(Image.fromarray(array, "RGBA"), "PNG"))
    tools.pack(str(root / "png"), str(root / "packed"), shards=2)
    os.makedirs(root / "npy")
    np.save(root / "npy" / "train.npy", arrays)
    np.save(root / "npy" / "train_labels.npy", np.repeat(np.int32([0, 1]), 3))
    np.savez_compressed(root / "npy" / "val.npz", images=arrays[:2], labels=np.uint8([1, 0]))
    np.savez(root / "unlabelled.npz", images=arrays)
    return str(root), arrays


@pytest.mark.parametrize("name, path", [("folder", "png"), ("records", "packed"), ("arrays", "npy")])
def test_a_fourth_channel_comes_out_as_it_is(depths, name, path):
    root, arrays = depths
    source = open_source(name, f"{root}/{path}", channels=4)
    assert (source.channels, source.num_classes, source.size) == (4, 2, 6)
    images = decoded(source)
    for index, (image, label) in images.items():
        np.testing.assert_array_equal(image, arrays[index])
        assert label == index // 3
    assert source.examples().map(source.decode).element_spec["image"].shape[-1] == 4
    if source.random_access:
        train, held_out = split_holdout(source, 0.3)
        assert train.channels == held_out.channels == 4
    if name != "arrays":      # three channels are still asked for by default, and are what they were
        plain = decoded(open_source(name, f"{root}/{path}"))
        np.testing.assert_array_equal(plain[0][0], arrays[0][..., :3])


def test_arrays_are_mapped_or_read(depths):
    root, arrays = depths
    mapped, read = (open_source("arrays", f"{root}/npy", split, channels=4) for split in ("train", "val"))
    assert isinstance(mapped._images, np.memmap) and mapped.image_shape == (40, 50, 4)
    np.testing.assert_array_equal(mapped.labels(), [0, 0, 0, 1, 1, 1])
    assert (mapped.random_access, mapped.can_fail, mapped.describe(3)) == (True, False, f"{root}/npy/train.npy[3]")
    np.testing.assert_array_equal(read.labels(), [1, 0])
    np.testing.assert_array_equal(decoded(read)[1][0], arrays[1])
    assert sorted(order(mapped, seed=1)) == list(range(6)) and has_split("arrays", f"{root}/npy", "val")
    alone = open_source("arrays", f"{root}/unlabelled.npz", channels=4)
    assert (alone.num_classes, alone.labels()) == (0, None)
    assert {label for _, label in decoded(alone).values()} == {-1}
    assert not has_split("arrays", f"{root}/unlabelled.npz", "val")
    np.testing.assert_array_equal(decode.decode_image(mapped.encoded({"index": np.int64(2)}), 4), arrays[2])


def test_arrays_on_a_remote_file_system():
    content = io.BytesIO()
    np.save(content, np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3))
    tf.io.gfile.makedirs("ram://arrays")
    with tf.io.gfile.GFile("ram://arrays/train.npy", "wb") as file:
        file.write(content.getvalue())
    source = open_source("arrays", "ram://arrays")
    np.testing.assert_array_equal(decoded(source)[1][0].ravel(), np.arange(24, 48))


def test_arrays_of_thirteen_channels_cannot_be_packed_but_need_not(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (3, 5, 6, 13), np.uint8)
    np.save(tmp_path / "bands.npy", arrays)
    source = open_source("arrays", str(tmp_path / "bands.npy"), channels=13)
    np.testing.assert_array_equal(decoded(source)[2][0], arrays[2])
    with pytest.raises(UsageError, match="at most 4 channels. Received: 13"):
        tools.pack(source, str(tmp_path / "packed"))


@pytest.mark.parametrize("array, message", [
    (np.zeros((2, 3, 4), np.uint8), r"uint8 \(N, H, W, C\). Received: uint8 \(2, 3, 4\)"),
    (np.zeros((2, 3, 4, 3), np.float32), r"Received: float32 \(2, 3, 4, 3\)"),
    (np.zeros((0, 3, 4, 3), np.uint8), "uint8"),
    (np.zeros((2, 3, 4, 4), np.uint8), "data.channels must be.*Received: 3, and 4 in")])
def test_unsuitable_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "train.npy", array)
    with pytest.raises(DataError, match=message):
        open_source("arrays", str(tmp_path))


def test_broken_and_missing_arrays_are_named(tmp_path):
    with pytest.raises(UsageError, match="'arrays' needs a path"):
        open_source("arrays")
    with pytest.raises(DataError, match="Looked for: train.npy, train.npz"):
        open_source("arrays", str(tmp_path))
    with pytest.raises(DataError, match="must be an existing file.*missing.npy"):
        open_source("arrays", str(tmp_path / "missing.npy"))
    for name, content in (("a.npy", b"no array"), ("b.npz", b"PK no archive")):
        write(str(tmp_path / name), content)
        with pytest.raises(DataError, match=f"{name} must hold arrays as NumPy saves them"):
            open_source("arrays", str(tmp_path / name))
    np.savez(tmp_path / "c.npz", pictures=np.zeros((2, 3, 4, 3), np.uint8))
    with pytest.raises(DataError, match="images"):
        open_source("arrays", str(tmp_path / "c.npz"))
    np.save(tmp_path / "train.npy", np.zeros((2, 3, 4, 3), np.uint8))
    for labels in (np.zeros(3, np.int64), np.float32([0, 1]), np.int64([0, -1])):
        np.save(tmp_path / "train_labels.npy", labels)
        with pytest.raises(DataError, match="labels must be integers"):
            open_source("arrays", str(tmp_path))


def test_files_that_cannot_have_the_channels_asked_for(photos, depths, tmp_path):
    with pytest.raises(DataError, match="4 channels must be PNG files. Received: 30 others of 30.*first ape/00.jpg"):
        open_source("folder", photos, channels=4)
    for name, path in (("folder", photos), ("records", f"{depths[0]}/packed")):
        with pytest.raises(UsageError, match="1 to 4. Received: 5.*\"arrays\""):
            open_source(name, path, channels=5)
    with pytest.raises(UsageError, match="'embedded' does not take channels"):
        open_source("embedded", channels=4)
    with pytest.raises(tf.errors.InvalidArgumentError):      # no fourth channel is invented
        decode.decode_image(tf.constant(encode(picture(), "PNG")), 4)
    grey = picture().convert("L")
    np.testing.assert_array_equal(decode.decode_image(tf.constant(encode(grey, "PNG")), 1)[..., 0], np.asarray(grey))


class TinyDepths(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "image": tfds.features.Image(shape=(40, 50, 4), encoding_format="png")}))

    def _split_generators(self, _):
        return {"train": ((i, {"image": with_depth(seed=i)}) for i in range(3))}

    def _generate_examples(self):
        raise AssertionError("the splits are given whole")


def test_tfds_images_of_four_channels(tmp_path):
    TinyDepths(data_dir=str(tmp_path)).download_and_prepare()
    source = open_source("tfds", "tiny_depths", data_dir=str(tmp_path), channels=4)
    assert source.image_shape == (40, 50, 4)
    expected = {with_depth(seed=i).tobytes() for i in range(3)}
    assert {image.tobytes() for image, _ in decoded(source).values()} == expected
    assert open_source("tfds", "tiny_depths", data_dir=str(tmp_path)).image_shape == (40, 50, 3)
    with pytest.raises(DataError, match="must be 3 or the images' own number. Received: 2, for tiny_depths with 4"):
        open_source("tfds", "tiny_depths", data_dir=str(tmp_path), channels=2)


# Grey images.

def test_share_of_grey_images(tmp_path, photos):
    assert sources.grey_share(open_source("embedded")) == 1.0
    assert sources.grey_share(open_source("folder", photos)) == 0.0
    for i in range(10):
        image = picture(seed=i).convert("L") if i < 4 else picture(seed=i)
        write(f"{tmp_path}/{i}.png", encode(image.convert("RGB") if i < 2 else image, "PNG"))
    write(f"{tmp_path}/broken.png", b"")
    assert sources.grey_share(open_source("folder", str(tmp_path))) == 0.4
    tools.pack(str(tmp_path), str(tmp_path / "packed"))
    assert sources.grey_share(open_source("records", str(tmp_path / "packed"))) == 0.4


# A held-out part.

def test_holdout_parts_the_images(photos):
    source = open_source("folder", photos)
    train, held_out = split_holdout(source, .2)
    assert (train.size, held_out.size) == (24, 6)
    paths = [[part.describe(i) for i in range(part.size)] for part in (train, held_out)]
    assert sorted(paths[0] + paths[1]) == sorted(source.describe(i) for i in range(30))
    assert paths[1] == sorted(paths[1]) != paths[0][:6]
    assert sorted(order(held_out, seed=0, epoch=3)) == list(range(6))
    for index, (image, label) in decoded(held_out).items():
        np.testing.assert_array_equal(image, np.asarray(Image.open(paths[1][index])))
        assert held_out.class_names[label] in paths[1][index] and label == held_out.labels()[index]
    again = split_holdout(open_source("folder", photos), .2)[1]
    assert [again.describe(i) for i in range(6)] == paths[1]


def test_holdout_leaves_both_parts_something(photos, packed):
    with pytest.raises(UsageError, match="fraction 1.0, 30 images"):
        split_holdout(open_source("folder", photos), 1.0)
    assert split_holdout(open_source("folder", photos), .001)[1].size == 1
    with pytest.raises(UsageError, match="random access.*Records"):
        split_holdout(open_source("records", packed), .1)


def test_a_fraction_has_the_same_share_of_each_class():
    source = sources.open_source("embedded")
    part = sources.fraction_of(source, 0.01)
    shares = np.round(np.bincount(source.labels()) * 0.01)
    assert part.size == shares.sum() and part.class_names == source.class_names
    np.testing.assert_array_equal(np.bincount(part.labels(), minlength=10), shares)
    again = sources.fraction_of(source, 0.01)
    np.testing.assert_array_equal(part.labels(), again.labels())
    assert part.describe(3) == again.describe(3)
    with pytest.raises(UsageError, match="at most 1"):
        sources.fraction_of(source, 1.5)
