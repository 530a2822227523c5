"""Where images come from: files → {"image": (H, W, C) uint8, "label": () int64, "index": () int64}.

A source has `size` (N), `num_classes` (0 without labels), `class_names`, `channels` (C, mostly 3), `image_shape`
((H, W, C), or None when images differ), and reads in two steps: `examples` is one epoch in order, cheap to iterate;
`decode` turns one of its elements into an image, and belongs into a parallel map. `index` is 0..N-1, the same for an
image in every run; `label` is -1 where there is none.
"""

import bisect
import difflib
import inspect
import io
import json
import os
import re
import zipfile

import numpy as np
import tensorflow as tf

from moco_tf.data.decode import decode_image, decode_usual, to_rgb
from moco_tf.errors import DataError, UsageError

EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "gif")    # in any case
IMAGE_SUFFIXES = tuple(b"." + extension.encode() for extension in EXTENSIONS)
EVALUATION_SPLITS = ("val", "validation", "test")    # "val" takes the first that exists
SHUFFLE_BUFFER = 10_000     # examples a stream holds in memory to shuffle them
INTERLEAVED_SHARDS = 16     # shards a stream reads at a time
READ_BYTES = 4 << 20        # per shard and read: what object stores like
SAMPLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "embedded", "fashion_mnist.npz")
SAMPLE_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class Source:
    """What all sources share. A subclass sets the attributes and defines `examples`, `encoded`, `label`, `describe`."""

    random_access = False
    can_fail = True    # reading an image may: its file may be gone or broken
    portable = True    # another process may read it: a data service's worker, the host of a TPU
    num_classes = 0
    class_names = ()
    channels = 3
    image_shape = None

    def decode(self, example):
        """One element of `examples` → {"image": (H, W, C) uint8, "label": () int64, "index": () int64}, in the graph.

        Raises:
            tf.errors.InvalidArgumentError: for an unreadable image.
            tf.errors.OpError, another one: for a file that cannot be read at all (gone, no permission).
        """
        return {"image": self.shaped(self.image(example)), "label": self.label(example), "index": self.index_of(example)}

    def shaped(self, image):
        return tf.ensure_shape(image, self.image_shape or (None, None, self.channels))

    def image(self, example):
        return decode_image(self.encoded(example), self.channels)

    def usual_image(self, example):
        """As `image`, in one operation, which may raise for other images than JPEG and PNG as well."""
        return decode_usual(self.encoded(example), self.channels)

    def index_of(self, example):
        return example["index"]

    def labels(self):
        """(N,) int64 labels by index where they cost nothing, else None."""
        return None


class RandomAccess(Source):
    """A source whose elements are just {"index": () int64}: any order and any start cost nothing.

    A subclass with labels sets `_labels`, (N,) int64 by index.
    """

    random_access = True
    _labels = None

    def examples(self, seed=None, epoch=None, start=0):
        """One epoch, as a tf.data.Dataset of {"index": () int64}.

        Args:
            seed: int; None for the order of `index`.
            epoch: () int, may be a tensor. The order is a function of seed and epoch alone.
            start: () int, may be a tensor; leaves out the first `start` of that order.
        """
        start = tf.cast(start, tf.int64)
        if seed is None:
            return tf.data.Dataset.range(start, self.size).map(lambda index: {"index": index})
        return tf.data.Dataset.from_tensor_slices({"index": permutation(self.size, epoch_key(seed, epoch))[start:]})

    def label(self, example):
        if self._labels is None:
            return tf.constant(-1, tf.int64)
        return tf.gather(self._labels, example["index"])

    def labels(self):
        return None if self._labels is None else self._labels.numpy()


class Stream(Source):
    """A source that is read from its beginning. A subclass defines `stored(key)` and `parse`."""

    def examples(self, seed=None, epoch=None, start=0):
        """One epoch, as a tf.data.Dataset of {"index": () int64, "encoded": () string, "label": () int64}.

        Args:
            seed: int; None for the order in which examples are stored: fixed, but not always that of `index`.
            epoch: () int, may be a tensor. The order is a function of seed and epoch alone: shards in a drawn order,
                interleaved, then a buffer of SHUFFLE_BUFFER examples.
            start: () int, may be a tensor; leaves out the first `start` of that order, which are read all the same.
        """
        start = tf.cast(start, tf.int64)
        if seed is None:
            return self.parsed(self.stored().skip(start))

        def shuffled(key):
            shard_key, buffer_key = tf.unstack(tf.random.split(key, 2))
            # Dataset.shuffle mixes the graph's seed with its own, and fails where that is 0. The graph meant here is
            # that of this function only.
            tf.random.set_seed(1)
            examples = self.stored(shard_key).shuffle(
                min(self.size, SHUFFLE_BUFFER), seed=tf.cast(buffer_key[0], tf.int64), reshuffle_each_iteration=False)
            return self.parsed(examples.skip(start))

        return tf.data.Dataset.from_tensors(epoch_key(seed, epoch)).flat_map(shuffled)

    def parsed(self, stored):
        return stored.map(self.parse, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def encoded(self, example):
        return example["encoded"]

    def label(self, example):
        return example["label"]


class Embedded(RandomAccess):
    """The sample in the package: 10,000 train and 2,000 test images of Fashion-MNIST, 28 x 28, of ten classes."""

    num_classes = len(SAMPLE_CLASSES)
    class_names = SAMPLE_CLASSES
    image_shape = (28, 28, 3)
    can_fail = False

    def __init__(self, path="", split="train", data_dir=""):
        if path:
            raise UsageError(
                f"The embedded sample is part of the package and takes no path. Received: {path!r}. "
                'For your own images set data.name to "folder", "records" or "tfds".')
        self.split = self.find_split(path, split)
        with np.load(SAMPLE) as arrays:
            self._images = host_tensor(arrays[f"{self.split}_images"])    # grey: a third of the memory
            self._labels = host_tensor(arrays[f"{self.split}_labels"].astype(np.int64))
        self.size = len(self._labels)

    @staticmethod
    def find_split(path, split, data_dir=""):
        for name in split_names(split):
            if name in ("train", "test"):
                return name
        raise DataError(f"The embedded sample has the splits train and test. Received: {split!r}.")

    def encoded(self, example):
        return tf.io.encode_png(tf.gather(self._images, example["index"])[..., None])

    def image(self, example):
        return to_rgb(tf.gather(self._images, example["index"]))

    def describe(self, index):
        return f"embedded {self.split}[{int(index)}]"


class Black(RandomAccess):
    """So many black images of one pixel: for the shapes of batches, and for what a pipeline takes besides the images."""

    can_fail = False

    def __init__(self, size, channels):
        self.size, self.channels = size, channels

    def image(self, example):
        return tf.zeros([1, 1, self.channels], tf.uint8)

    def describe(self, index):
        return f"black[{int(index)}]"


class Folder(RandomAccess):
    """Image files below a folder, flat or nested, local or remote; hidden ones and other extensions are left out.

    An image's index is the rank of its relative path. Its label is the rank of its class folder, the first part of that
    path, when every image lies in one and there are at least two of them; otherwise there are no labels.

    Args:
        path: a folder, local or of any file system TensorFlow knows (gs://...).
        split: `path/split` is read where it is a folder, else, for "train", `path` itself.
        classes: names of class folders; others are left out. () for all.
        channels: 3, or those of PNG files: 1, 2 or 4 (see `decode_image`).

    Raises:
        DataError: no such folder or split, no image in it, no image for one of `classes`, or other files than PNG where
            not 3 channels are asked for.
    """

    def __init__(self, path="", split="train", data_dir="", classes=(), channels=3):
        self.channels = file_channels(channels)
        self.root = self.find_split(path, split)
        paths = sorted(list_images(self.root))
        if classes:
            wanted = {os.fsencode(name) for name in classes}
            paths = [path for path in paths if b"/" in path and class_folder(path) in wanted]
            missing = sorted(wanted.difference(map(class_folder, paths)))
            if missing:
                raise DataError(
                    f"Every class asked for must be a folder with images in {self.root}. Without: {len(missing)} of "
                    f"{len(wanted)}, first {readable(missing[0])!r}.")
        if not paths:
            raise DataError(
                f"The folder must hold images (.{', .'.join(EXTENSIONS)}), in it or in folders below. "
                f"Received: {self.root}.")
        others = [path for path in paths if not path.lower().endswith(b".png")] if channels != 3 else []
        if others:
            raise DataError(f"Images of {channels} channels must be PNG files. Received: {len(others)} others of "
                            f"{len(paths)} in {self.root}, first {readable(others[0])}.")
        self.size = len(paths)
        self._paths = host_tensor(paths)
        folders, counts = class_runs(paths)
        if len(folders) > 1 or classes:
            names = sorted(folders)    # "a" before "a-b", whose paths come first
            self.class_names, self.num_classes = tuple(map(readable, names)), len(names)
            rank = {folder: label for label, folder in enumerate(names)}
            self._labels = host_tensor(np.repeat(np.array([rank[folder] for folder in folders], np.int64), counts))

    @staticmethod
    def find_split(path, split, data_dir=""):
        require_path("folder", path)
        if not tf.io.gfile.isdir(path):
            raise DataError(f"The path must be an existing folder of images. Received: {path}.")
        for name in split_names(split):
            folder = os.path.join(path, name)
            if tf.io.gfile.isdir(folder):
                return folder
        if split == "train":
            apart = [name for name in EVALUATION_SPLITS if tf.io.gfile.isdir(os.path.join(path, name))]
            if apart:    # all of `path` would train on what is meant for evaluation
                raise DataError(f"A folder with a split {apart[0]!r} must have a folder 'train' beside it. "
                                f"Received: {path}, without. Give the images to train on as the path.")
            return path
        raise DataError(f"The split must be a folder in {path}. Looked for: {', '.join(split_names(split))}.")

    def encoded(self, example):
        return tf.io.read_file(tf.strings.join([self.root, "/", tf.gather(self._paths, example["index"])]))

    def describe(self, index):
        return os.path.join(self.root, readable(self._paths[int(index)].numpy()))


class Records(Stream):
    """TFRecord shards that `moco-tf data pack` has written, beside a `<split>.json` that says what they hold.

    `channels` as in `Folder`.

    Raises:
        DataError: no such folder or split, an unfinished pack, or a shard that is missing.
    """

    def __init__(self, path="", split="train", data_dir="", channels=3):
        self.channels = file_channels(channels)
        self.path, self.split = path, self.find_split(path, split)
        facts = read_facts(path, self.split)
        self.shards = facts["shards"]
        present = set(tf.io.gfile.listdir(path))
        missing = [shard["name"] for shard in self.shards if shard["name"] not in present]
        if missing:
            raise DataError(
                f"All {len(self.shards)} shards named in {facts_path(path, self.split)} must be beside it. "
                f"Missing: {len(missing)}, first {missing[0]}. Copy them again, or pack again with overwrite.")
        self.size = facts["examples"]
        self.class_names = tuple(facts["class_names"])
        self.num_classes = len(self.class_names)
        self.image_shape = facts["image_shape"] and (*facts["image_shape"][:2], channels)
        self._shard_paths = host_tensor([os.path.join(path, shard["name"]) for shard in self.shards])
        self._left_out = host_tensor(np.array(facts["left_out"], np.int64))

    @staticmethod
    def find_split(path, split, data_dir=""):
        require_path("records", path)
        if not tf.io.gfile.isdir(path):
            raise DataError(f"The path must be an existing folder of records. Received: {path}.")
        for name in split_names(split):
            if tf.io.gfile.exists(facts_path(path, name)):
                return name
        raise DataError(
            f"{path} holds no finished pack of split {split!r}: its {split}.json, written last, is missing. "
            "Make it with moco-tf data pack; if that was interrupted, run it again.")

    def stored(self, key=None):
        paths = self._shard_paths
        if key is not None:
            paths = tf.gather(paths, permutation(len(self.shards), key))
        return tf.data.Dataset.from_tensor_slices(paths).interleave(
            lambda path: tf.data.TFRecordDataset(path, buffer_size=READ_BYTES),
            cycle_length=1 if key is None else min(len(self.shards), INTERLEAVED_SHARDS),
            num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def of_shard(self, seed, number):
        """(example, epoch) of one shard. `number`, () int, counts the shards of all epochs, each in its own order."""
        epoch, rank = number // len(self.shards), number % len(self.shards)
        path = tf.gather(self._shard_paths, permutation(len(self.shards), epoch_key(seed, epoch))[rank])
        return tf.data.TFRecordDataset(path, buffer_size=READ_BYTES).map(
            lambda serialized: (self.parse(serialized), epoch))

    def parse(self, serialized):
        features = tf.io.parse_single_example(serialized, {
            "image/encoded": tf.io.FixedLenFeature((), tf.string),
            "image/label": tf.io.FixedLenFeature((), tf.int64, default_value=-1),
            "index": tf.io.FixedLenFeature((), tf.int64)})
        index = features["index"]
        # Records keep the index of what they were packed from; what was left out there must leave no gap here.
        index -= tf.searchsorted(self._left_out, index[None], out_type=tf.int64)[0]
        return {"index": index, "encoded": features["image/encoded"], "label": features["image/label"]}

    def describe(self, index):
        return f"{os.path.join(self.path, self.split)}[{int(index)}]"


class Tfds(Stream):
    """A data set of tensorflow-datasets, already prepared; index is the position in its files.

    The files are read one after the other, in stored order (tensorflow-datasets shuffles when it prepares them), and
    shuffled by the buffer only. Packed as records they are read faster and shuffled better.

    Args:
        path: name as in `tfds.builder`: "fashion_mnist", "imagenet2012:5.1.0".
        split: a name or tfds's slicing, "train[:90%]".
        data_dir: tfds's folder; "" for its default.
        feature: name of the image in an example. The label is "label" where that is a class.
        download: prepares the data first where they are not.
        channels: 3: RGB, from images of 1, 3 or 4 channels. Another number: that of the images.

    Raises:
        DataError: an unknown name or split, data that are not prepared, or no such image.
    """

    def __init__(self, path="", split="train", data_dir="", feature="image", download=False, channels=3):
        import tensorflow_datasets as tfds    # takes seconds: only for those who use it

        self.path = path
        builder = tfds_builder(path, data_dir)
        if download:
            builder.download_and_prepare()
        self.split = self.find_split(path, split, data_dir)
        features = dict(builder.info.features.items())
        if not isinstance(features.get(feature), tfds.features.Image) or features[feature].np_dtype == np.float32:
            raise DataError(
                f"The data set {path} must have an image of integers named {feature!r}. It has: {', '.join(features)}. "
                "Name the right one by data.feature.")
        wanted = {feature}
        if isinstance(features.get("label"), tfds.features.ClassLabel):
            wanted.add("label")
            self.num_classes = features["label"].num_classes
            self.class_names = tuple(features["label"].names)
        height, width, stored = features[feature].shape
        if channels not in (3, stored):
            raise DataError(f"data.channels must be 3 or the images' own number. Received: {channels}, for {path} with "
                            f"{stored}.")
        self.channels = channels
        self.image_shape = (height, width, channels) if height and width else None
        try:
            dataset = builder.as_dataset(
                split=self.split, shuffle_files=False,
                decoders=tfds.decode.PartialDecoding(wanted, decoders={feature: tfds.decode.SkipDecoding()}),
                read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False))
        except (AssertionError, ValueError) as error:    # what tfds raises for data not prepared, and for a wrong slice
            raise DataError(
                f"The data set {path} with split {split!r} must be prepared in {builder.data_path}. "
                f"Run tfds build {path}, or set data.download=True. "
                f"tensorflow-datasets says: {one_line(error)}") from error
        self.size = int(dataset.cardinality())
        self._feature = feature
        self._dataset = dataset.enumerate()

    @staticmethod
    def find_split(path, split, data_dir=""):
        present = list(tfds_builder(path, data_dir).info.splits)
        for name in split_names(split):
            # Not prepared, it has no splits yet: reading will tell. A slice, such as train[:90%], is tfds's to judge.
            if name in present or not present or not name.isidentifier():
                return name
        raise DataError(f"The split must be one of {path}'s: {', '.join(present)}. Received: {split!r}.")

    def stored(self, key=None):
        return self._dataset

    def parse(self, index, features):
        label = tf.cast(features.get("label", -1), tf.int64)
        return {"index": index, "encoded": features[self._feature], "label": label}

    def describe(self, index):
        return f"{self.path} {self.split}[{int(index)}]"


class Arrays(RandomAccess):
    """Images in NumPy's files: uint8 (N, H, W, C) of any C, such as RGB and depth in one array.

    The path is a file, or a folder with a file for each split, <split>.npy or <split>.npz. An .npz holds "images", and
    "labels" where there are some. Beside an .npy they are in <name>_labels.npy. Labels are integers (N,), 0 or more.
    Local .npy files are mapped, not read; others are read into memory.

    Raises:
        DataError: no such file or split, other arrays in it, or another number of channels than `channels`.
    """

    can_fail = portable = False

    def __init__(self, path="", split="train", data_dir="", channels=3):
        self.path = self.find_split(path, split)
        try:
            self._images, labels = read_arrays(self.path)
        except (OSError, tf.errors.OpError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.path} must hold arrays as NumPy saves them. Received: {one_line(error)}.") from None
        if self._images.ndim != 4 or self._images.dtype != np.uint8 or not self._images.size:
            raise DataError(f"The images must be uint8 (N, H, W, C). Received: {self._images.dtype} "
                            f"{self._images.shape} in {self.path}.")
        self.size, *shape = self._images.shape
        self.image_shape, self.channels = tuple(shape), shape[2]
        if channels != self.channels:
            raise DataError(f"data.channels must be the images' number of channels. Received: {channels}, and "
                            f"{self.channels} in {self.path}.")
        if labels is not None:
            if labels.shape != (self.size,) or labels.dtype.kind not in "iu" or labels.min() < 0:
                raise DataError(f"The labels must be integers ({self.size},), 0 or more. Received: {labels.dtype} "
                                f"{labels.shape} for {self.path}.")
            self.num_classes = int(labels.max()) + 1
            self.class_names = tuple(map(str, range(self.num_classes)))
            self._labels = host_tensor(labels.astype(np.int64))

    @staticmethod
    def find_split(path, split, data_dir=""):
        require_path("arrays", path)
        if tf.io.gfile.isdir(path):
            files = [f"{name}.{ending}" for name in split_names(split) for ending in ("npy", "npz")]
            found = [os.path.join(path, file) for file in files if tf.io.gfile.exists(os.path.join(path, file))]
            if not found:
                raise DataError(f"The split must be a file in {path}. Looked for: {', '.join(files)}.")
            return found[0]
        if split != "train" or not tf.io.gfile.exists(path):
            raise DataError(f"The path must be an existing file, of the split train, or a folder with a file for each "
                            f"split. Received: {path}, split {split!r}.")
        return path

    def image(self, example):
        return tf.numpy_function(lambda index: self._images[index], [example["index"]], tf.uint8, stateful=False)

    def encoded(self, example):
        if self.channels > 4:
            raise UsageError(f"A PNG holds at most 4 channels. Received: {self.channels} in {self.path}. Read the "
                             "arrays as they are; they need no packing.")
        return tf.io.encode_png(self.image(example))

    def describe(self, index):
        return f"{self.path}[{int(index)}]"


class Subset(RandomAccess):
    """Part of a random-access source, as a source: its images get the indices 0..n-1.

    Args:
        source: a source with random access.
        keep: (n,) int64 indices of `source`; image i of the subset is `keep[i]` of the source.
    """

    def __init__(self, source, keep):
        self.source, self.size = source, len(keep)
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.channels, self.image_shape = source.channels, source.image_shape
        self.can_fail, self.portable = source.can_fail, source.portable
        self._keep = host_tensor(np.asarray(keep, np.int64))

    def _of_source(self, example):
        return {"index": tf.gather(self._keep, example["index"])}

    def encoded(self, example):
        return self.source.encoded(self._of_source(example))

    def image(self, example):
        return self.source.image(self._of_source(example))

    def label(self, example):
        return self.source.label(self._of_source(example))

    def labels(self):
        labels = self.source.labels()
        return None if labels is None else labels[self._keep.numpy()]

    def describe(self, index):
        return self.source.describe(self._keep[int(index)])


SOURCES = {"embedded": Embedded, "folder": Folder, "records": Records, "tfds": Tfds, "arrays": Arrays}


def open_source(name, path="", split="train", data_dir="", **others):
    """The source of that name; `others` are keywords of its constructor.

    Raises:
        UsageError: an unknown name, or a keyword that this source does not take.
        DataError: whatever is wrong with the files.
    """
    source = constructor(name)
    unknown = sorted(set(others).difference(inspect.signature(source).parameters))
    if unknown:
        raise UsageError(
            f"The data source {name!r} does not take {', '.join(unknown)}. Leave it out, or change data.name.")
    return source(path=path, split=split, data_dir=data_dir, **others)


def has_split(name, path="", split="val", data_dir=""):
    """Whether `open_source` would find that split. Lists no images."""
    try:
        constructor(name).find_split(path, split, data_dir)
    except DataError:
        return False
    return True


def split_holdout(source, fraction):
    """Two sources, to train and held out: round(fraction * N) images, at least one, drawn by N and `fraction` alone.

    Raises:
        UsageError: a source without random access, or a fraction that leaves one of the two empty.
    """
    if not source.random_access:
        raise UsageError(
            "Images can be held out of a source with random access (embedded, folder, arrays) only. "
            f"Received: {type(source).__name__}. Pack or name a split of its own for evaluation.")
    held_out = max(1, round(fraction * source.size))
    if not 0 < fraction < 1 or held_out >= source.size:
        raise UsageError(
            "The held-out part must be between 0 and 1, and leave images to train on. "
            f"Received: fraction {fraction}, {source.size} images.")
    with tf.device("CPU:0"):
        order = permutation(source.size, epoch_key(0, 0)).numpy()
    return Subset(source, np.sort(order[held_out:])), Subset(source, np.sort(order[:held_out]))


def fraction_of(source, fraction):
    """Part of a source: round(fraction * n) of the n images of each class, at least one; of all, where there are no labels.

    Which ones is drawn by N and `fraction` alone, so that every run on 1 % sees the same images.

    Raises:
        UsageError: a source without random access, or a fraction outside 0..1.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"data.fraction must be above 0 and at most 1. Received: {fraction}.")
    if not source.random_access:
        raise UsageError("A fraction can be taken of a source with random access (embedded, folder, arrays). Received: "
                         f"{type(source).__name__}. Name a split that holds the part, such as TFDS' "
                         "imagenet2012_subset/1pct.")
    with tf.device("CPU:0"):
        order = permutation(source.size, epoch_key(0, 0)).numpy()
    labels = source.labels() if source.num_classes else np.zeros(source.size, np.int64)
    of_class = (order[labels[order] == label] for label in range(max(1, source.num_classes)))
    kept = [members[:max(1, round(fraction * len(members)))] for members in of_class]
    return Subset(source, np.sort(np.concatenate(kept)))


def grey_share(source, sample=32):
    """The share of grey images, their channels equal in every pixel, among the first `sample` readable ones: of a drawn
    order where the source has random access, else of the stored one; 0.0 where none can be read."""
    examples = source.examples(0, 0) if source.random_access else source.examples()

    def is_grey(example):
        image = source.decode(example)["image"]
        return tf.reduce_all(image == image[..., :1])

    grey = list(examples.take(sample).map(is_grey, tf.data.AUTOTUNE).ignore_errors().as_numpy_iterator())
    return float(np.mean(grey)) if grey else 0.0


def constructor(name):
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        raise UsageError(
            f"The data source must be one of: {', '.join(SOURCES)}. Received: {name!r}."
            + (f" Did you mean {near[0]!r}?" if near else ""))
    return SOURCES[name]


def epoch_key(seed, epoch):
    """(2,) int64, the seed of stateless ops for one epoch; `epoch` may be a tensor."""
    return tf.random.fold_in(tf.constant([seed, 0], tf.int64), tf.cast(epoch, tf.int64))


def permutation(size, key):
    """(size,) int64: range(size) in the order that `key` draws, any of all orders with equal chance.

    `tf.random.experimental.index_shuffle` would spare the memory, but drew only 256 different orders in 1000 epochs of
    10,000 images, some of them alike (correlated by 0.15). A million indices take 15 ms this way.
    """
    return tf.random.experimental.stateless_shuffle(tf.range(size, dtype=tf.int64), key)


def host_tensor(value):
    """A tensor in host memory: a tf.data function takes it as an input, where a list would be copied into its graph."""
    with tf.device("CPU:0"):
        return tf.constant(value)


def file_channels(channels):
    """The number of channels asked of image files, if they can have it."""
    if channels not in (1, 2, 3, 4):
        raise UsageError(f'data.channels of image files must be 1 to 4. Received: {channels}. The data source "arrays" '
                         "takes any number.")
    return channels


def read_arrays(path):
    """(images, labels or None) of an .npy or .npz file."""
    def load(name):
        if "://" not in name:
            return np.load(name, mmap_mode="r")    # mapped if it is an .npy
        with tf.io.gfile.GFile(name, "rb") as file:
            return np.load(io.BytesIO(file.read()))

    loaded = load(path)
    if isinstance(loaded, np.ndarray):
        labels = f"{os.path.splitext(path)[0]}_labels.npy"
        return loaded, np.array(load(labels)) if tf.io.gfile.exists(labels) else None
    with loaded as arrays:
        return arrays["images"], arrays["labels"] if "labels" in arrays else None


def list_images(root):
    """Relative paths, bytes with "/" between parts, of all images below `root`, in no particular order.

    Raises:
        DataError: a folder that cannot be listed.
    """
    try:
        return list_remote_images(root) if "://" in root else list_local_images(root)
    except (OSError, tf.errors.OpError) as error:
        raise DataError(f"Every folder below {root} must be readable. {one_line(error)}") from error


def list_local_images(root):
    # In bytes: names need not be valid UTF-8, and a million of them take half the memory.
    images, folders = [], [b""]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(os.fsencode(root), folder)) as entries:
            for entry in entries:
                name = entry.name
                if name[:1] == b".":
                    continue
                if entry.is_dir():
                    folders.append(folder + name + b"/")
                elif is_image_name(name):
                    images.append(folder + name)
    return images


def list_remote_images(root):
    # Not gfile.walk, which asks the server about each name: there, what has an image's extension is taken for one.
    images, folders = [], [""]
    while folders:
        folder = folders.pop()
        for name in tf.io.gfile.listdir(os.path.join(root, folder)):
            path = folder + name.rstrip("/")
            if name.startswith("."):
                continue
            if is_image_name(os.fsencode(name)):
                images.append(os.fsencode(path))
            elif name.endswith("/") or tf.io.gfile.isdir(os.path.join(root, path)):
                folders.append(path + "/")
    return images


def is_image_name(name):
    return name.lower().endswith(IMAGE_SUFFIXES)


def class_folder(path):
    return path.partition(b"/")[0]


def class_runs(paths):
    """The class folders of sorted paths, as they come, and how many paths are in each; none where a path is in no folder."""
    folders, ends, end = [], [0], 0
    while end < len(paths):
        folder, slash, _ = paths[end].partition(b"/")
        if not slash:
            return [], []
        folders.append(folder)
        end = bisect.bisect_left(paths, folder + b"0", end)    # "0" is what comes after "/"
        ends.append(end)
    return folders, np.diff(ends)


def readable(name):
    return name.decode("utf-8", "replace")


def one_line(error):
    return re.sub(r"\s+", " ", str(error)).strip()


def split_names(split):
    """Names to look for, in order."""
    return EVALUATION_SPLITS if split == "val" else (split,)


def require_path(name, path):
    if not path:
        raise UsageError(f"The data source {name!r} needs a path. Received none. Set data.path.")


def facts_path(path, split):
    """The file whose existence says that a pack is complete."""
    return os.path.join(path, f"{split}.json")


def read_facts(path, split):
    """What `pack` has noted: examples, shards (name, examples, bytes), class_names, image_shape, left_out (indices)."""
    name = facts_path(path, split)
    try:
        with tf.io.gfile.GFile(name) as file:
            facts = json.load(file)
        return {key: facts[key] for key in ("examples", "shards", "class_names", "image_shape", "left_out")}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} must be as moco-tf data pack wrote it. Wrong or missing in it: {error}.") from error


def tfds_builder(path, data_dir):
    """tfds.builder, its errors in ours."""
    import tensorflow_datasets as tfds

    require_path("tfds", path)
    try:
        return tfds.builder(path, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        raise DataError(
            f"tensorflow-datasets must know the name, or have it prepared in data_dir. Received: {path!r}, "
            f"data_dir {data_dir or 'default'}.") from error
