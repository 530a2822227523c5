"""A split through an encoder, once: into memory for monitors, into files for what is measured of it later."""

import hashlib
import io
import json

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from moco_tf import __version__
from moco_tf.data.pipeline import Unreadable, evaluation_batches
from moco_tf.errors import DataError, UsageError
from moco_tf.files import write_file
from moco_tf.heads import parts
from moco_tf.losses import at_least_float32, unit

keras = tf.keras

BATCH = 128               # images through the encoder at a time
SHARD_BYTES = 64 << 20    # of a file of rows, at most
SAMPLE = 64               # images whose pixels stand for the data and the view in the digest


class Extractor:
    """Turns views into unit rows, in inference mode.

    Args:
        encoder: images -> embeddings, with the pooled features in the layer "features".
        normalize: uint8 images -> what the encoder takes.
    """

    def __init__(self, encoder, normalize):
        model = keras.Model(encoder.input, [part.output for part in parts(encoder).values()])

        @tf.function(reduce_retracing=True)
        def rows(images):
            features, embeddings = model(normalize(images), training=False)
            return unit(at_least_float32(features)), unit(embeddings)

        self.rows = rows

    def __call__(self, batches):
        """Reads `evaluation_batches` to the end.

        Returns:
            ({view: (features (n, D), embeddings (n, C))}, labels (n,), index (n,)), NumPy, unit rows.
        """
        found, labels, indexes = {}, [], []
        for views, label, index, real in batches:
            real = real.numpy()
            for name, images in views.items():
                found.setdefault(name, []).append([rows.numpy()[real] for rows in self.rows(images)])
            labels.append(label.numpy()[real])
            indexes.append(index.numpy()[real])
        _some_readable(sum(map(len, labels)))
        joined = {name: tuple(np.concatenate(column) for column in zip(*rows)) for name, rows in found.items()}
        return joined, np.concatenate(labels), np.concatenate(indexes)


def _some_readable(count):
    if not count:
        raise DataError("Some images to evaluate on must be readable. Received: none that is. "
                        "`moco-tf data check` lists them.")


# ---------------------------------------------------------------------------------------------- in files

class Features:
    """The rows of a split in the files of a folder, read a shard at a time; as the encoder gave them, not unit rows.

    Attributes:
        count, dim, num_classes: n, D and C.
        labels, index: (n,) int64, in memory.
        shards: how many rows each has. starts: the position of each one's first row.
        left_out: how many images of the split could not be read.
    """

    def __init__(self, folder):
        self.folder = folder
        with tf.io.gfile.GFile(_manifest(folder)) as file:
            facts = json.load(file)
        self.dim, self.dtype, self.left_out = facts["dim"], np.dtype(facts["dtype"]), facts["left_out"]
        self.shards, self.starts = facts["shards"], np.cumsum([0, *facts["shards"]])
        self.count, self.num_classes = int(self.starts[-1]), len(facts["of"]["data"]["class_names"])
        notes = [_read(_notes(folder, shard), [rows, 2], np.dtype(np.int64)) for shard, rows in enumerate(self.shards)]
        self.index, self.labels = np.concatenate(notes).T

    def read(self, shard, spans=None):
        """Rows of a shard, (n, D).

        Args:
            spans: [(first, count)] of the rows to read; None: all.

        Raises:
            DataError: the file is damaged or gone.
        """
        return _read(_rows(self.folder, shard), [self.shards[shard], self.dim], self.dtype, spans)

    def all(self):
        """(n, D), in memory."""
        rows = np.empty([self.count, self.dim], self.dtype)
        for shard, first in enumerate(self.starts[:-1]):
            rows[first:first + self.shards[shard]] = self.read(shard)
        return rows

    def blocks(self, size):
        """All rows in order, in arrays of `size` rows; the last one may have fewer."""
        for first in range(0, self.count, size):
            end = min(first + size, self.count)
            shards = range(np.searchsorted(self.starts, first, "right") - 1, np.searchsorted(self.starts, end))
            spans = [(max(first, self.starts[i]), min(end, self.starts[i + 1])) for i in shards]
            yield np.concatenate([self.read(i, [(a - self.starts[i], b - a)]) for i, (a, b) in zip(shards, spans)])


def cached_features(encoder, source, recipe, features, folder, about, title, max_unreadable=0.0, workers=0):
    """The rows of a split: those in `folder` if they are of these weights, data and view; else they are put there.

    They have a folder of their own in it, named by a digest of all that they depend on, so that whatever changes makes
    new ones. A pass that was stopped goes on after its last whole shard. Of the images themselves the digest holds
    their number, their labels (where these cost nothing to list) and what the encoder sees of SAMPLE of them: it does
    not notice every file that was replaced under its name.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        source: of images. recipe: with the view "image", of the encoder's size.
        features: "backbone" or "embedding".
        folder: for all splits, local or gs://; one process at a time may write into it.
        about: {name: value}, which data these are.
        title: of the split, for the progress bar.
        max_unreadable: share of the images; above it the pass ends.
        workers: parallel calls; 0: by the number of cores.

    Returns:
        `Features`, in the order in which the source stores its images.

    Raises:
        UsageError: features that the encoder does not have; a folder that cannot be written.
        DataError: unreadable images; rows that are not finite.
    """
    one = encoder.rows(tf.zeros([1, encoder.size, encoder.size, encoder.channels], tf.uint8), features)
    shard_images = BATCH * max(1, SHARD_BYTES // (BATCH * one.shape[1] * one.dtype.size))
    labels = [] if source.labels() is None else [source.labels()]
    facts = {
        "encoder": {"weights": encoder.fingerprint(), "is": encoder.description, "features": features,
                    "size": encoder.size,
                    "backbone": encoder.config.backbone.to_dict() if encoder.config else encoder.path,
                    "levels": _levels(encoder), "precision": keras.mixed_precision.global_policy().name},
        "data": {**about, "images": source.size, "class_names": source.class_names, "labels": _digest(labels),
                 "sample": _sample(source, recipe, workers)},
        "shard_images": shard_images, "moco_tf": __version__}
    folder = f"{folder}/{_digest([json.dumps(facts, sort_keys=True)])[:16]}"
    if not tf.io.gfile.exists(_manifest(folder)):
        shards = _write_shards(encoder, source, recipe, features, folder, title, shard_images, max_unreadable, workers)
        _some_readable(sum(shards))
        _write(_manifest(folder), json.dumps({"dim": one.shape[1], "dtype": one.dtype.name, "shards": shards,
                                              "left_out": source.size - sum(shards), "of": facts}, indent=2) + "\n")
    return Features(folder)


def _write_shards(encoder, source, recipe, features, folder, title, shard_images, max_unreadable, workers):
    """Writes the shards that are not there yet; returns how many rows each has."""
    shards = []
    while tf.io.gfile.exists(_rows(folder, len(shards))):
        shards.append(len(_read(_notes(folder, len(shards)), None, np.dtype(np.int64))))
    first = min(len(shards) * shard_images, source.size)
    unreadable = Unreadable(source, max_unreadable)
    batches = evaluation_batches(_From(source, first), recipe, BATCH, workers=workers, unreadable=unreadable)
    forward = tf.function(lambda images: encoder.rows(images, features), autograph=False)
    rows, notes, done = [], [], first
    try:
        with tqdm(total=source.size, initial=first, desc=f"{title} through the encoder", unit="image") as bar:
            for views, label, index, real in batches:
                real = real.numpy()
                rows.append(forward(views["image"]).numpy()[real])
                notes.append(np.stack([index, label], axis=1)[real])
                _finite(rows[-1], notes[-1], encoder, source)
                bar.update(min(BATCH, source.size - done))
                done += BATCH
                if done % shard_images == 0 or done >= source.size:
                    shards.append(sum(map(len, rows)))
                    _write(_notes(folder, len(shards) - 1), _npy(notes))
                    _write(_rows(folder, len(shards) - 1), _npy(rows))    # last: it says that the shard is whole
                    rows, notes = [], []
    except tf.errors.OpError as error:
        raise unreadable.over_limit() or DataError(
            f"The pass over the images must not fail. Received: {_first_line(error)}. `moco-tf data check` looks at "
            "the images; what was computed so far is kept.") from None
    return shards


class _From:
    """A source without its first images, for one pass in stored order."""

    def __init__(self, source, first):
        self.source, self.first, self.size = source, first, source.size - first

    def __getattr__(self, name):
        return getattr(self.source, name)

    def examples(self):
        return self.source.examples(start=self.first)


def _finite(rows, notes, encoder, source):
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise DataError(f"The features must be finite. Received: {int(bad.sum())} of {len(rows)} rows that are not, "
                        f"first that of {source.describe(notes[bad][0, 0])}, from {encoder.path} "
                        f"({encoder.description}). The encoder has diverged: use an earlier checkpoint.")


def _sample(source, recipe, workers):
    """A digest of what the encoder sees of some images: drawn ones where any can be read, else the first."""
    batch = evaluation_batches(source, recipe, SAMPLE, limit=SAMPLE if source.random_access else 0, workers=workers)
    views, *notes = next(iter(batch))
    return _digest(part.numpy() for part in (views["image"], *notes))


def _levels(encoder):
    """What black, white and a colour become, six digits: the space and the constants that images are normalised in."""
    channels = encoder.channels
    levels = tf.constant([[[[0] * channels, [255] * channels, [255] + [0] * (channels - 1)]]], tf.uint8)
    return [f"{value:.5e}" for value in tf.reshape(tf.cast(encoder.normalize(levels), tf.float64), [-1]).numpy()]


def _digest(values):
    digest = hashlib.sha256()
    for value in values:
        digest.update(value.encode() if isinstance(value, str) else np.asarray(value).tobytes())
    return digest.hexdigest()


def _manifest(folder):
    """Written last: it says that all shards are there."""
    return f"{folder}/manifest.json"


def _rows(folder, shard):
    return f"{folder}/{shard:05d}.npy"


def _notes(folder, shard):
    """(n, 2) int64, the index and the label of each row."""
    return f"{folder}/{shard:05d}.index.npy"


def _npy(parts):
    file = io.BytesIO()
    np.save(file, np.concatenate(parts))
    return file.getvalue()


def _write(path, content):
    try:
        tf.io.gfile.makedirs(path.rsplit("/", 1)[0])
        write_file(path, content)
    except (tf.errors.OpError, OSError) as error:
        raise UsageError(f"Features must be written into a folder with room for them. Received: {_first_line(error)}. "
                         "Make room, or name another folder by --cache.") from None


def _read(path, shape, dtype, spans=None):
    """An array of `dtype` and `shape` (None: whatever it has), or the given spans of its rows."""
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            np.lib.format.read_magic(file)
            found, _, kind = np.lib.format.read_array_header_1_0(file)
            if kind != dtype or shape not in (None, list(found)):
                raise ValueError(f"an array of {kind}, {found}")
            start, size = file.tell(), int(np.prod(found[1:])) * dtype.itemsize
            parts, count = [], 0
            for first, rows in spans or [(0, found[0])]:
                file.seek(start + first * size)
                parts.append(file.read(rows * size))
                count += rows
            return np.frombuffer(b"".join(parts), dtype).reshape(count, *found[1:])
    except (tf.errors.OpError, OSError, ValueError) as error:
        raise DataError(f"{path} must be as it was written. Received: {_first_line(error)}. Remove its folder: the "
                        "features are then computed anew.") from None


def _first_line(error):
    return str(getattr(error, "message", error)).strip().split("\n")[0].rstrip(".")
