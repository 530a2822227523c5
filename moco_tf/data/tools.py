"""Look at images before a run, and pack them: the library side of `moco-tf data check` and `moco-tf data pack`."""

import collections
import concurrent.futures
import dataclasses
import functools
import json
import os
import re
import time

import numpy as np
import tensorflow as tf
import tqdm

from moco_tf.data.decode import decode_image
from moco_tf.data.sources import Folder, Records, facts_path, list_images, one_line, read_facts, readable, require_path
from moco_tf.errors import DataError, UsageError
from moco_tf.files import write_file

SHARD_BYTES = 150_000_000    # a shard that holds so much is closed: large reads, and shards enough to mix
SHOWN_GROUPS = 20
TYPES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"BM": "BMP", b"GIF8": "GIF"}    # by the first bytes


@dataclasses.dataclass
class Report:
    """What `check` found."""

    path: str            # the folder that was looked at
    images: int          # readable ones
    types: dict          # "JPEG": how many, by content
    groups: dict         # folder below `path`, or class of packed images: how many; {} where there are none
    shorter: tuple       # side in pixels: (min, median, max); () without readable images
    longer: tuple
    unreadable: list     # of (name below `path`, reason)
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
    """An image that was decoded, or, with a `reason`, could not be."""

    name: str
    group: str = ""
    encoded: bytes = b""
    shape: tuple = ()
    reason: str = ""


def check(path, split=None, workers=None):
    """Decodes every image of a folder or a pack, and goes on past those that cannot be.

    Args:
        path: a folder of images, or of shards written by `pack`.
        split: a split as the sources find it; None for all images below `path`, or all splits packed there.
        workers: threads; None for the number of processors.

    Returns:
        A `Report`. An image in a pack is named by its shard and place; damage to a shard is listed once, as the shard.

    Raises:
        DataError: no such folder or split, no images, or an unfinished pack.
    """
    started = time.perf_counter()
    require_path("check", path)
    splits = packed_splits(path)
    root, total, tasks = packed_images(path, split, splits) if splits else folder_images(path, split)
    types, groups, sizes, unreadable = collections.Counter(), collections.Counter(), [], []
    for image in progress(in_parallel(tasks, workers), total, "checked"):
        if image.reason:
            unreadable.append((image.name, image.reason))
            continue
        types[file_type(image.encoded)] += 1
        groups[image.group] += 1
        sizes.append(image.shape[:2])
    del groups[""]
    sides = np.sort(np.array(sizes, np.int32).reshape(-1, 2), axis=1)
    return Report(path=root, images=len(sizes), types=dict(types), groups=dict(sorted(groups.items())),
                  shorter=spread(sides[:, 0]), longer=spread(sides[:, 1]), unreadable=unreadable,
                  seconds=time.perf_counter() - started)


def format_report(report):
    """A `Report` as text for the terminal, its unreadable files last, one a line."""
    lines = [f"{report.path}: {report.images} readable images, {len(report.unreadable)} unreadable, "
             f"{report.images / report.seconds:.0f} images/s"]
    if report.images:
        lines.append("types: " + counts(report.types))
        lines.append("sides in pixels (min / median / max): shorter {} / {:g} / {}, longer {} / {:g} / {}".format(
            *report.shorter, *report.longer))
    if report.groups:
        shown = dict(list(report.groups.items())[:SHOWN_GROUPS])
        more = len(report.groups) - len(shown)
        lines.append(f"{len(report.groups)} folders or classes: {counts(shown)}" + f" and {more} more" * bool(more))
    return "\n".join(lines + unreadable_lines(report.unreadable, "unreadable"))


def pack(source, out, split="train", shards=None, overwrite=False, workers=None):
    """Writes a source into TFRecord shards, which are read in long stretches, so faster than single files.

    Encoded bytes are copied as they are (the embedded sample becomes PNG); images that do not decode are left out. A
    source with random access is written in a drawn order, because a stream is shuffled only within a buffer. Records
    hold "image/encoded", "image/label" (-1: none) and "index", that of the source.

    Shards have temporary names while they are written, and `<split>.json`, without which nothing is read, comes last:
    a pack that was killed never looks complete, and packing again clears away what it left.

    Args:
        source: a source, or the path of a folder of images with that split.
        out: folder to write to, local or remote.
        split: name to write it by.
        shards: how many; None for as many as make some 150 MB each.
        overwrite: replaces a finished pack of that split.
        workers: threads; None for the number of processors.

    Returns:
        A `Packed`.

    Raises:
        UsageError: `out` holds a finished pack of that split.
        DataError: the source cannot be read or has no readable image, or `out` cannot be written.
    """
    started = time.perf_counter()
    if isinstance(source, (str, os.PathLike)):
        source = Folder(os.fspath(source), split)
    if tf.io.gfile.exists(facts_path(out, split)) and not overwrite:
        raise UsageError(f"{out} must not hold a finished pack of split {split!r} yet. Set overwrite to replace it.")
    try:
        clear(out, split)
        facts, unreadable = write_shards(source, out, split, shards, workers)
        if not facts["examples"]:
            raise DataError(f"There must be readable images to pack. Unreadable: all {len(unreadable)}.")
        write_file(facts_path(out, split), json.dumps(facts))
    except tf.errors.OpError as error:
        raise DataError(f"Packing must be able to read its source and to write {out}. {reason(error)}") from error
    return Packed(path=out, split=split, images=facts["examples"], shards=len(facts["shards"]),
                  bytes=sum(shard["bytes"] for shard in facts["shards"]), unreadable=unreadable,
                  seconds=time.perf_counter() - started)


def format_packed(packed):
    """A `Packed` as text for the terminal."""
    first = (f"{packed.path}: {packed.images} images of split {packed.split} in {packed.shards} shards, "
             f"{packed.bytes / 1e6:.1f} MB, {packed.images / packed.seconds:.0f} images/s")
    return "\n".join([first] + unreadable_lines(packed.unreadable, "left out as unreadable"))


def folder_images(path, split):
    """(folder, number of images, tasks: functions that return an `Image`)."""
    if not tf.io.gfile.isdir(path):
        raise DataError(f"The path must be an existing folder of images. Received: {path}.")
    root = Folder.find_split(path, split) if split else path
    names = sorted(list_images(root))
    if not names:
        raise DataError(f"There must be images in the folder or below. Received: {root}.")

    def examined_file(name):
        group = readable(os.path.dirname(name))
        return examined(readable(name), group, lambda: tf.io.read_file(os.path.join(os.fsencode(root), name)))

    return root, len(names), (functools.partial(examined_file, name) for name in names)


def packed_images(path, split, splits):
    """As `folder_images`, of the shards of one split or of all."""
    facts = [read_facts(path, Records.find_split(path, name)) for name in ([split] if split else splits)]

    def examined_record(name, serialized, class_names):
        record = tf.train.Example.FromString(serialized).features.feature
        label = record["image/label"].int64_list.value[0]
        return examined(name, class_names[label] if class_names else "",
                        lambda: tf.constant(record["image/encoded"].bytes_list.value[0]))

    def tasks():
        for pack_facts in facts:
            for shard in pack_facts["shards"]:
                place = 0
                try:
                    for serialized in tf.data.TFRecordDataset(os.path.join(path, shard["name"])).as_numpy_iterator():
                        yield functools.partial(
                            examined_record, f"{shard['name']}[{place}]", serialized, pack_facts["class_names"])
                        place += 1
                    damage = "file ends"
                except tf.errors.OpError as error:
                    damage = reason(error)
                if place != shard["examples"]:
                    yield functools.partial(
                        Image, shard["name"], reason=f"{damage} after {place} of {shard['examples']} images")

    return path, sum(pack_facts["examples"] for pack_facts in facts), tasks()


def packed_splits(path):
    """Names of the splits, finished or not, of which there are shards in `path`."""
    if not tf.io.gfile.isdir(path):
        return []
    matches = (re.fullmatch(r"(.+)-\d{5}\.tfrecord", name) for name in tf.io.gfile.listdir(path))
    return sorted({match[1] for match in matches if match})


def write_shards(source, out, split, shards, workers):
    """The facts for `<split>.json`, and the (name, reason) of what was left out."""
    done, left_out, unreadable, shapes = [], [], [], set()
    writer, examples = None, 0

    def close():
        writer.close()
        name = shard_name(split, len(done))
        tf.io.gfile.rename(os.path.join(out, name + ".partial"), os.path.join(out, name))
        done.append({"name": name, "examples": examples, "bytes": tf.io.gfile.stat(os.path.join(out, name)).length})

    order = source.examples(seed=0, epoch=0) if source.random_access else source.examples()
    tasks = (functools.partial(examined_example, source, example) for example in order)
    written = 0
    for position, (index, image, record) in enumerate(progress(in_parallel(tasks, workers), source.size, "packed")):
        if image.reason:
            left_out.append(index)
            unreadable.append((image.name, image.reason))
            continue
        if writer is None:
            writer = tf.io.TFRecordWriter(os.path.join(out, shard_name(split, len(done)) + ".partial"))
            examples = written = 0
        writer.write(record)
        shapes.add(image.shape)
        examples, written = examples + 1, written + len(record)
        full = written >= SHARD_BYTES if shards is None else (position + 1) * shards >= (len(done) + 1) * source.size
        if full:
            close()
            writer = None
    if writer is not None:
        close()
    return dict(
        examples=sum(shard["examples"] for shard in done), shards=done, class_names=list(source.class_names),
        image_shape=shapes.pop() if len(shapes) == 1 else None, left_out=sorted(left_out)), unreadable


def examined_example(source, example):
    """(index, `Image`, serialized record) of one element of `source.examples()`."""
    index = int(example["index"])
    image = examined(source.describe(index), "", lambda: source.encoded(example))
    if image.reason:
        return index, image, b""
    record = tf.train.Example(features=tf.train.Features(feature={
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.encoded])),
        "image/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[int(source.label(example))])),
        "index": tf.train.Feature(int64_list=tf.train.Int64List(value=[index]))}))
    return index, image, record.SerializeToString()


def examined(name, group, read):
    """The `Image` that `read`, a function, gives as () string tensor."""
    with tf.device("CPU:0"):
        try:
            encoded = read()
            return Image(name, group, encoded.numpy(), tuple(decode_image(encoded).shape))
        except tf.errors.OpError as error:
            return Image(name, group, reason=reason(error))


def clear(out, split):
    """Makes `out` a folder without a pack of `split`, finished or not."""
    tf.io.gfile.makedirs(out)
    if tf.io.gfile.exists(facts_path(out, split)):
        tf.io.gfile.remove(facts_path(out, split))    # first: from here on it is no finished pack
    for name in tf.io.gfile.listdir(out):
        if re.fullmatch(re.escape(split) + r"-\d{5}\.tfrecord(\.partial)?", name):
            tf.io.gfile.remove(os.path.join(out, name))


def in_parallel(tasks, workers=None):
    """Results of functions without arguments, in order, from `workers` threads: TensorFlow's ops run side by side."""
    workers = workers or os.cpu_count()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way = collections.deque()
        for task in tasks:
            under_way.append(pool.submit(task))
            if len(under_way) > 8 * workers:    # bounded: a million results would not fit
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def progress(items, total, what):
    """The items, with a bar on the terminal (rate, time left); nothing is shown where there is no terminal."""
    return tqdm.tqdm(items, total=total, desc=what, unit=" images", disable=None)


def shard_name(split, number):
    return f"{split}-{number:05d}.tfrecord"


def file_type(encoded):
    return next((name for start, name in TYPES.items() if encoded.startswith(start)), "other")


def spread(sides):
    """(min, median, max), () of nothing."""
    return (int(sides.min()), float(np.median(sides)), int(sides.max())) if len(sides) else ()


def reason(error):
    """What a tf.errors.OpError says, without the names of kernels and ops around it."""
    return re.sub(r"^\{\{.*?\}\}\s*|\s*\[Op:.*$", "", one_line(error.message))


def counts(numbers):
    return ", ".join(f"{name} {number}" for name, number in numbers.items())


def unreadable_lines(unreadable, title):
    return [f"{title}: {len(unreadable)}"] * bool(unreadable) + [f"  {name}: {why}" for name, why in unreadable]
