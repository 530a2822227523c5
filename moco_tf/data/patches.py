"""Photographs cut into patches: many small images from a few large ones, for trying things out."""

import functools
import os

import tensorflow as tf

from moco_tf.data.decode import decode_image
from moco_tf.data.sources import list_images, readable
from moco_tf.data.tools import in_parallel, progress, reason, unreadable_lines
from moco_tf.errors import DataError, UsageError
from moco_tf.views.ops import nearest


def cut(path, out, side=32, shorter_side=512, workers=None):
    """Cuts every image below a folder into a grid of square patches that do not overlap; what is left at the right and
    the lower edge is dropped.

    Patches of a photograph are PNG files in a folder of its name, so that photographs are classes.

    Args:
        path: a folder of images, local or gs://.
        out: a new or empty folder.
        side: of a patch, in pixels.
        shorter_side: to which a photograph is first reduced, if it is larger; 0: none is.

    Returns:
        (number of patches, of photographs, [(name, reason) of those left out]).

    Raises:
        UsageError: sides that cannot be; `out` holds something.
        DataError: no images there, or none that gave a patch.
    """
    if side < 8 or (shorter_side and shorter_side < side):
        raise UsageError(f"A patch has at least 8 pixels a side, and a photograph at least a patch's. Received: side {side}, "
                         f"shorter_side {shorter_side}.")
    if tf.io.gfile.exists(out) and (not tf.io.gfile.isdir(out) or tf.io.gfile.listdir(out)):
        raise UsageError(f"OUT must be a new or empty folder. Received: {out}. Name another.")
    if not tf.io.gfile.isdir(path):
        raise DataError(f"The path must be an existing folder of images. Received: {path}.")
    names = sorted(readable(name) for name in list_images(path))
    folders = [os.path.join(out, folder) for folder in _folders(names)]
    tasks = (functools.partial(_cut_one, path, name, folder, side, shorter_side) for name, folder in zip(names, folders))
    done, left_out = [], []
    for name, patches, why in progress(in_parallel(tasks, workers), len(names), "cut"):
        (left_out.append((name, why)) if why else done.append(patches))
    if not done:
        raise DataError(f"Some images must be readable and give a patch of {side} pixels. Received: {path}, with "
                        f"{len(names)} images{f', such as {left_out[0][0]}: {left_out[0][1]}' if left_out else ''}.")
    return sum(done), len(done), left_out


def format_cut(out, result):
    """What `cut` returned, as text for the terminal."""
    patches, photographs, left_out = result
    return "\n".join([f"{out}: {patches} patches of {photographs} photographs",
                      *unreadable_lines(left_out, "left out")])


def _folders(names):
    """A folder's name for each photograph, "/" written "-"; with the ending where two would share one, and a number where
    they still would."""
    stems = [os.path.splitext(name)[0].replace("/", "-") for name in names]
    folders = [stem if stems.count(stem) == 1 else name.replace("/", "-") for stem, name in zip(stems, names)]
    return [folder if folders.count(folder) == 1 else f"{folder}-{place}" for place, folder in enumerate(folders)]


def _cut_one(path, name, folder, side, shorter_side):
    """(name, number of patches written, why there are none)."""
    with tf.device("CPU:0"):
        try:
            image = decode_image(tf.io.read_file(os.path.join(path, name)))
        except tf.errors.OpError as error:
            return name, 0, reason(error)
        shortest = min(image.shape[:2])
        if shorter_side and shortest > shorter_side:
            sides = [round(edge * shorter_side / shortest) for edge in image.shape[:2]]
            image = tf.cast(nearest(tf.image.resize(image, sides, "bilinear", antialias=True)), tf.uint8)
        rows, columns = image.shape[0] // side, image.shape[1] // side
        if not rows * columns:
            return name, 0, f"{image.shape[1]} x {image.shape[0]} pixels"
        tf.io.gfile.makedirs(folder)
        for row in range(rows):
            for column in range(columns):
                patch = image[row * side:(row + 1) * side, column * side:(column + 1) * side]
                tf.io.write_file(f"{folder}/{row:03d}-{column:03d}.png", tf.io.encode_png(patch))
        return name, rows * columns, ""
