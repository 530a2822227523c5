"""Look at images before a run, and pack them: the library side of `moco-tf data check` and `moco-tf data pack`."""

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import time

import numpy as np
import tensorflow as tf
import tqdm

from moco_tf.data.decode import decode_image
from moco_tf.data.sources import (
    Folder, Records, class_folder, facts_path, list_images, one_line, read_facts, readable, require_path)
from moco_tf.errors import DataError, UsageError

SHARD_BYTES = 150_000_000    # a shard is closed once it holds so much: large reads, and still enough shards to mix
SHOWN_FOLDERS = 20
TYPES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"BM": "BMP", b"GIF8": "GIF"}    # by the first bytes


@dataclasses.dataclass
class Report:
    """What `check` found."""

    path: str
    images: int          # readable
    types: dict          # "JPEG": how many, by content
    groups: dict         # folder, or class of packed records: how many; {} where there are none
    shorter: tuple       # side in pixels: (min, median, max); () without readable images
    longer: tuple
    unreadable: list     # of (name, reason)
    seconds: float


@dataclasses.dataclass
class Packed:
    """What `pack` wrote."""

    path: str
    split: str
    images: int
    shards: int
    bytes: int
    unreadable: list     # of (name, reason): left out
    seconds: float


@dataclasses.dataclass
class Image:
    """One decoded image, or the reason why there is none."""

    name: str
    group: str = ""
    encoded: bytes = b""
    shape: tuple = ()
    reason: str = ""


def check(path, split=None, workers=None):
    """Decodes every image of a folder or a pack, and goes on past those that cannot be.

    Args:
        path: a folder of images, or of shards written by `pack`.
        split: as for the sources; None for everything below `path`, or every split packed there.
        workers: threads; None for the number of processors.

    Returns:
        A `Report`; names in it are relative to `path`, those of records say shard and position.

    Raises:
        DataError: no such folder or split, no images, or an unfinished pack.
    """
    started = time.perf_counter()
    require_path("check", path)
    packs = packed_splits(path)
    if packs:
        total, items, examine = records_to_check(path, [Records.find_split(path, split)] if split else packs)
    else:
        total, items, examine = files_to_check(path, split)
    types, groups, shapes, unreadable = collections.Counter(), collections.Counter(), [], []
    for image in progress(in_parallel(examine, items, workers), total, "check"):
        if image.reason:
            unreadable.append((image.name, image.reason))
            continue
        types[file_type(image.encoded)] += 1
        groups[image.group] += 1
        shapes.append(image.shape[:2])
    del groups[""]
    sides = np.sort(np.array(shapes, np.int32).reshape(-1, 2), axis=1)
    return Report(
        path, len(shapes), dict(types), dict(sorted(groups.items())), spread(sides[:, 0]), spread(sides[:, 1]),
        unreadable, time.perf_counter() - started)


def files_to_check(path, split):
    if not tf.io.gfile.isdir(path):
        raise DataError(f"The path must be an existing folder of images. Received: {path}.")
    root = Folder.find_split(path, split) if split else path
    names = sorted(list_images(root))
    if not names:
        raise DataError(f"There must be images in the folder or below. Received: {root}.")

    def examine(name):
        image = Image(readable(os.path.join(os.path.relpath(os.fsencode(root), os.fsencode(path)), name)))
        return decoded(image, lambda: tf.io.read_file(os.path.join(os.fsencode(root), name)))

    return len(names), names, examine


def progress(items, total, what):
    """The items, with a bar on the terminal: rate and time left. Silent where there is no terminal."""
    return tqdm.tqdm(items, total=total, desc=what, unit="img", disable=None, smoothing=0.1)
