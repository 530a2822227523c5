"""Augmentation against torchvision and Pillow: every photo and crop statistic of the golden files."""

import glob
import json
import os

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.views import ops

FOLDER = os.environ.get("MOCO_TF_GOLDEN", os.path.dirname(__file__))
LETTERS = {"b": "brightness", "c": "contrast", "s": "saturation", "h": "hue"}


def runs(kind):
    """(file, run) of every run of a kind."""
    found = []
    for path in sorted(glob.glob(os.path.join(FOLDER, "*.npz"))):
        with np.load(path) as arrays:
            for key in arrays.files:
                if key.endswith("/settings") and json.loads(str(arrays[key]))["kind"] == kind:
                    found.append((path, key[:-len("/settings")]))
    return found


class Run:
    """The arrays and settings of one run."""

    def __init__(self, path, name):
        self.arrays, self.name = np.load(path), name
        self.settings = json.loads(str(self["settings"]))

    def __getitem__(self, key):
        return self.arrays[f"{self.name}/{key}"]

    def planes(self):
        return ops.to_planes(tf.constant(self["rgb"]))


@pytest.fixture(params=runs("photo"), ids=lambda run: run[1])
def photo(request):
    return Run(*request.param)


@pytest.fixture(params=[False, True], ids=["plain", "xla"])
def compiled(request):
    return lambda f: tf.function(f, jit_compile=request.param)


def error(planes, expected, scale=1.0):
    """|difference| of (3, H, W) planes from an (H, W, 3) array in units of 1 / scale."""
    return np.abs(np.transpose(planes, [1, 2, 0]) - np.float64(scale) * expected) / scale


def within(errors, bounds):
    assert errors.max() <= bounds["max"]
    assert errors.mean() <= bounds.get("mean", bounds["max"])


def test_single_adjustments(photo, compiled):
    tolerance = photo.settings["tolerance"]
    for key, factors in photo.settings["factors"].items():
        operation = ops.JITTERS[factors["operation"]]
        levels = compiled(lambda planes, factor, operation=operation: operation(planes, factor))
        tensor = compiled(lambda planes, factor, operation=operation: operation(planes, factor, levels=False))
        for i, factor in enumerate(factors["values"]):
            factor = tf.constant(factor, tf.float32)
            within(error(levels(photo.planes(), factor), photo[f"pil/{key}"][i]), tolerance["pil_levels"][key])
            assert (error(tensor(photo.planes(), factor), photo[f"tensor/{key}"][i], 255.0).max()
                    <= tolerance["tensor"].get(key, tolerance["tensor"]["all"]))


def test_jitter_in_every_order(photo, compiled):
    tolerance, names = photo.settings["tolerance"], list(ops.JITTERS)
    orders = [[names.index(LETTERS[letter]) for letter in order] for order in photo.settings["jitter_orders"]]
    jitter = compiled(lambda planes, factors, order: ops.jitter(planes, names, factors, order))
    for number, factors in enumerate(photo.settings["jitter_sets"]):
        factors = tf.constant([factors[name] for name in names], tf.float32)
        for i, order in enumerate(orders):
            within(error(jitter(photo.planes(), factors, tf.constant(order)), photo[f"pil/jitter{number}"][i]),
                   tolerance["pil_levels"]["jitter"])
        tensor = ops.jitter(photo.planes(), names, factors, tf.constant(orders[0]), levels=False)
        assert error(tensor, photo[f"tensor/jitter{number}_order0"], 255.0).max() <= tolerance["tensor"]["jitter"]


def test_grey_flip_and_solarize(photo):
    tolerance, planes = photo.settings["tolerance"], photo.planes()
    within(error(ops.grayscale(planes), photo["pil/gray3"]), tolerance["pil_levels"]["gray3"])
    assert (error(ops.grayscale(planes, levels=False), photo["tensor/gray3"], 255.0).max()
            <= tolerance["tensor"]["all"])
    within(error(ops.flip(planes), photo["pil/hflip"]), tolerance["pil_levels"]["hflip"])
    threshold = photo.settings["solarize_threshold"]
    within(error(ops.solarize(planes, threshold), photo[f"pil/solarize{threshold}"]),
           tolerance["pil_levels"][f"solarize{threshold}"])


def test_blur(photo, compiled):
    """The file's bounds are those of a true Gaussian in the interior; Pillow's own passes meet them everywhere."""
    bounds = photo.settings["tolerance"]["pil_levels"]["blur"]
    blur = compiled(ops.blur)
    for case in photo.settings["blur"]:
        within(error(blur(photo.planes(), tf.constant(case["sigma"], tf.float32)), photo[f"pil/{case['key']}"]),
               {"mean": bounds["mean"], "max": bounds["max_interior"]})


def test_resized_crops(photo):
    tolerance, crops = photo.settings["tolerance"], photo.settings["crops"]
    size, image = crops["size"], tf.constant(photo["rgb"])
    for i, (top, left, height, width) in enumerate(crops["boxes_ijhw"]):
        frame = ops.Frame(tf.constant([top, left]), tf.constant([height, width]), tf.zeros([2]),
                          tf.constant([height / size, width / size]))
        for planes in (tf.transpose(ops.resample(image, frame, size), [2, 1, 0]),
                       ops.resample_planes(image, frame, size)):
            assert error(planes, photo["tensor/resized_crop"][i], 1.0).max() <= 255.0 * tolerance["tensor"]["all"]
            within(error(ops.nearest(planes), photo["pil/resized_crop"][i]), tolerance["pil_levels"]["resized_crop"])


def test_validation_crop(photo):
    validation, image = photo.settings["validation"], tf.constant(photo["rgb"])
    size = validation["center_crop"]
    frame = ops.central_crop(size, validation["resize"])(tf.shape(image)[:2], seed=None)
    planes = tf.transpose(ops.nearest(ops.resample(image, frame, size)), [2, 1, 0])
    within(error(planes, photo["pil/val_resize_centercrop"]), photo.settings["tolerance"]["pil_levels"]["resized_crop"])


def test_normalize(photo):
    normalized = ops.normalize(tf.constant(photo["rgb"])[None], **photo.settings["normalize"])[0]
    np.testing.assert_allclose(normalized, photo["totensor_normalize"], rtol=0,
                               atol=photo.settings["tolerance"]["tensor"]["all"])


@pytest.mark.parametrize("path, name", runs("crop_statistics"), ids=lambda value: os.path.basename(str(value)))
def test_crop_statistics(path, name):
    run = Run(path, name)
    settings, tolerance = run.settings, run.settings["tolerance"]
    height, width = settings["height"], settings["width"]
    numbers = ops.uniform(tf.constant([3, 4]), [2 * tolerance["draws_at_least"], 22])
    boxes = ops.crop_box(numbers, tf.constant(height), tf.constant(width), settings["scale"], settings["ratio"])
    top, left, box_height, box_width = (box.numpy().astype(np.float64) for box in boxes)
    area, log_aspect = box_height * box_width / (height * width), np.log(box_width / box_height)

    def rows(values):
        return [np.mean(values), np.std(values)] + [np.quantile(values, q) for q in settings["rows"][2:]]

    for key, values, scale in [("area", area, 1.0), ("log_aspect", log_aspect, 1.0),
                               ("center_x", (left + box_width / 2) / width, 1.0),
                               ("center_y", (top + box_height / 2) / height, 1.0),
                               ("w", box_width / width, width), ("h", box_height / height, height)]:
        bound = tolerance.get(key, tolerance["center"])
        np.testing.assert_allclose(rows(values), run[key] / scale, rtol=0, atol=bound, err_msg=key)
    np.testing.assert_allclose(np.corrcoef(area, np.abs(log_aspect))[0, 1], run["corr_area_aspect"], atol=0.01)
