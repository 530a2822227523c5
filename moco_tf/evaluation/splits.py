"""The two labelled splits that an evaluation needs, and their features."""

import atexit
import shutil
import tempfile

import numpy as np

from moco_tf.config import RUN_DEFAULTS
from moco_tf.errors import DataError
from moco_tf.evaluation.features import cached_features
from moco_tf.train import evaluation_recipe, is_run, open_data


def labelled_splits(config):
    """(training source, held-out source) of a config's data section, labelled, of the same classes.

    Raises:
        DataError: no labels, nothing held out, or other classes in it.
    """
    train, held_out = open_data(config)
    if not train.num_classes:
        raise DataError("Accuracy needs labels: class folders, or labelled records. Received: images without. "
                        "Pre-training reports view retrieval for such.")
    if held_out is None:
        raise DataError("Accuracy needs held-out images. Received: none. Name their split by data.eval_split.")
    if held_out.class_names != train.class_names:
        raise DataError("The held-out images must be of the same classes as those to train on. Received: "
                        f"{_classes(held_out, train)}, against {_classes(train, held_out)}.")
    return train, held_out


def _classes(one, other):
    alone = sorted(set(one.class_names) - set(other.class_names))
    return f"{one.num_classes} classes" + (f", with {', '.join(alone[:3])}" if alone else "")


def check_labels(labels, num_classes, describe):
    """Raises DataError unless all labels (n,) are in 0 .. num_classes - 1; `describe(row)` names one that is not."""
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise DataError(f"Labels must be in 0 .. {num_classes - 1}, one for each class. Received: {labels[bad[0]]} for "
                        f"{describe(bad[0])}; {len(bad)} such in all.")


def cached_splits(encoder, config, features, cache=""):
    """The features of the training and of the held-out images, as `Features`.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        config: whose data section says which images, and whose section `evaluation`, if it has one, how they are shown.
        features: "backbone" or "embedding".
        cache: folder to keep them in, or to find them in; "": features/ in the encoder's workdir where it has one, else
            a temporary one.

    Raises:
        DataError, UsageError: see `labelled_splits`, `check_labels`, `cached_features`.
    """
    workdir = own_workdir(encoder)
    folder = cache or (f"{workdir}/features" if workdir else _temporary_folder())
    data, defaults = config.data, RUN_DEFAULTS["data"]
    which = {key: value for key, value in data.items()
             if value != defaults.get(key) and key not in ("workers", "max_unreadable", "download", "repeats")}
    found = []
    for title, source in zip(("training images", "held-out images"), labelled_splits(config)):
        recipe = evaluation_recipe(encoder.size, source, **config.get("evaluation", {}))
        rows = cached_features(encoder, source, recipe, features, folder, {"config": which, "images_are": title}, title,
                               data.max_unreadable, data.workers)
        check_labels(rows.labels, rows.num_classes, lambda row: source.describe(rows.index[row]))
        found.append(rows)
    return found


def own_workdir(encoder):
    """The workdir of the run that an encoder is of; "" for a file's or a SavedModel's."""
    return encoder.path if is_run(encoder.path) else ""


def _temporary_folder():
    folder = tempfile.mkdtemp(prefix="moco_tf_features_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
