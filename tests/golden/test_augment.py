"""Augmentation against torchvision, Pillow and timm: every photo, mixture and statistic of the golden files."""

import zlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.train import normalizer
from moco_tf.views import colour, mixture, ops
from moco_tf.views.recipes import RECIPES

from . import weights
from .replay import runs

LETTERS = {"b": "brightness", "c": "contrast", "s": "saturation", "h": "hue"}


def planes_of(photo):
    return ops.to_planes(tf.constant(photo["rgb"]))


def of_runs(kind):
    """The arguments of `pytest.fixture`: every run of a kind."""
    found = runs(kind)
    return dict(params=found, ids=[run.id for run in found])


@pytest.fixture(**of_runs("photo"))
def photo(request):
    return request.param


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
            within(error(levels(planes_of(photo), factor), photo[f"pil/{key}"][i]), tolerance["pil_levels"][key])
            assert (error(tensor(planes_of(photo), factor), photo[f"tensor/{key}"][i], 255.0).max()
                    <= tolerance["tensor"].get(key, tolerance["tensor"]["all"]))


def test_jitter_in_every_order(photo, compiled):
    tolerance, names = photo.settings["tolerance"], list(ops.JITTERS)
    orders = [[names.index(LETTERS[letter]) for letter in order] for order in photo.settings["jitter_orders"]]
    jitter = compiled(lambda planes, factors, order: ops.jitter(planes, names, factors, order))
    for number, factors in enumerate(photo.settings["jitter_sets"]):
        factors = tf.constant([factors[name] for name in names], tf.float32)
        for i, order in enumerate(orders):
            within(error(jitter(planes_of(photo), factors, tf.constant(order)), photo[f"pil/jitter{number}"][i]),
                   tolerance["pil_levels"]["jitter"])
        tensor = ops.jitter(planes_of(photo), names, factors, tf.constant(orders[0]), levels=False)
        assert error(tensor, photo[f"tensor/jitter{number}_order0"], 255.0).max() <= tolerance["tensor"]["jitter"]


def test_grey_flip_and_solarize(photo):
    tolerance, planes = photo.settings["tolerance"], planes_of(photo)
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
        within(error(blur(planes_of(photo), tf.constant(case["sigma"], tf.float32)), photo[f"pil/{case['key']}"]),
               {"mean": bounds["mean"], "max": bounds["max_interior"]})


def test_colour_spaces(photo, compiled):
    """Errors are relative to the range that each channel has in the photo."""
    def check(function, expected, what):
        found = compiled(function)(planes_of(photo))
        errors = error(found, expected) / np.ptp(expected, axis=(0, 1))
        assert errors.max() <= photo.settings["tolerance"]["space"], what

    for space in photo.settings["spaces"]:
        check(lambda planes, space=space: colour.convert(planes, space), photo[f"space/{space}"], space)
    for space, constants in photo.settings["space_normalized"].items():
        np.testing.assert_allclose(colour.SPACES[space].middle, constants["mean"], rtol=1e-12)
        np.testing.assert_allclose(colour.SPACES[space].half_range, constants["std"], rtol=1e-12)
        check(lambda planes, space=space: colour.normalized(planes, space), photo[f"space_normalized/{space}"], space)


def test_colour_spaces_of_a_recipe(photo):
    """As the step normalises views and as the pipeline does; a crop of all of the photo is the photo."""
    image, seed = tf.constant(photo["rgb"]), tf.constant([1, 2])
    for space in photo.settings["space_normalized"]:
        recipe = RECIPES["cmc"](size=len(photo["rgb"]), crop_min=1.0, flip=0.0, space=space)
        view = recipe.apply(image, seed)["query"]
        np.testing.assert_array_equal(view, photo["rgb"])
        expected = photo[f"space_normalized/{space}"]
        bound = photo.settings["tolerance"]["space"] * np.ptp(expected, axis=(0, 1))
        in_step = normalizer(recipe)(view[None])[0]
        in_input = recipe.normalized().apply(image, seed)["query"]
        for found in (in_step, in_input):
            assert found.dtype == tf.float32 and (np.abs(found - expected) <= bound).all(), space
        np.testing.assert_allclose(in_step, in_input, rtol=0, atol=1e-6)


def test_resized_crops(photo):
    tolerance, crops = photo.settings["tolerance"], photo.settings["crops"]
    size, image = crops["size"], tf.constant(photo["rgb"])
    for i, (top, left, height, width) in enumerate(crops["boxes_ijhw"]):
        frame = ops.Frame(tf.constant([top, left]), tf.constant([height, width]), tf.zeros([2]),
                          tf.constant([height / size, width / size]))
        frames = ops.Frame(*(part[None] for part in frame))
        for key, interpolation in crops["filters"].items():
            for planes in (tf.transpose(ops.resample(image, frames, size, interpolation)[0], [1, 2, 0]),
                           ops.resample_planes(image, frame, size, interpolation)):
                within(error(ops.nearest(planes), photo[f"pil/{key}"][i]), tolerance["pil_levels"]["resized_crop"])
                if f"tensor/{key}" in photo.keys("tensor/"):
                    assert (error(planes, photo[f"tensor/{key}"][i], 1.0).max()
                            <= 255.0 * tolerance["tensor"]["all"])


def test_validation_crop(photo):
    validation, image = photo.settings["validation"], tf.constant(photo["rgb"])
    size = validation["center_crop"]
    frames = ops.central_crop(size, validation["resize"]).frame(tf.shape(image)[:2], tf.zeros([1, 1]))
    planes = tf.transpose(ops.nearest(ops.resample(image, frames, size)[0]), [1, 2, 0])
    within(error(planes, photo["pil/val_resize_centercrop"]), photo.settings["tolerance"]["pil_levels"]["resized_crop"])


def test_normalize(photo):
    constants, bound = photo.settings["normalize"], photo.settings["tolerance"]["tensor"]["all"]
    for normalized in (ops.normalize(tf.constant(photo["rgb"])[None], **constants)[0],
                       tf.transpose(ops.normalize_planes(planes_of(photo), **constants), [1, 2, 0])):
        np.testing.assert_allclose(normalized, photo["totensor_normalize"], rtol=0, atol=bound)


def rows(values, settings):
    """Mean, standard deviation and the quantiles of the settings."""
    return [np.mean(values), np.std(values)] + [np.quantile(values, q) for q in settings["rows"][2:]]


@pytest.fixture(**of_runs("crop_statistics"))
def crop_run(request):
    return request.param


def test_crop_statistics(crop_run):
    settings, tolerance = crop_run.settings, crop_run.settings["tolerance"]
    height, width = settings["height"], settings["width"]
    numbers = ops.uniform(tf.constant([3, 4]), [2 * tolerance["draws_at_least"], 22])
    boxes = ops.crop_box(numbers, tf.constant(height), tf.constant(width), settings["scale"], settings["ratio"])
    top, left, box_height, box_width = (box.numpy().astype(np.float64) for box in boxes)
    area, log_aspect = box_height * box_width / (height * width), np.log(box_width / box_height)
    for key, values, scale in [("area", area, 1.0), ("log_aspect", log_aspect, 1.0),
                               ("center_x", (left + box_width / 2) / width, 1.0),
                               ("center_y", (top + box_height / 2) / height, 1.0),
                               ("w", box_width / width, width), ("h", box_height / height, height)]:
        bound = tolerance.get(key, tolerance["center"])
        np.testing.assert_allclose(rows(values, settings), crop_run[key] / scale, rtol=0, atol=bound, err_msg=key)
    np.testing.assert_allclose(np.corrcoef(area, np.abs(log_aspect))[0, 1], crop_run["corr_area_aspect"], atol=0.01)


@pytest.fixture(**of_runs("erasing_statistics"))
def erasing_run(request):
    return request.param


def test_erasing_statistics(erasing_run):
    """Many draws, because the reference's own 50,000 leave its quantiles uncertain by half of the tolerance; and sides
    spread over their last pixel, because the median aspect lies beside the step that squares make."""
    settings, tolerance = erasing_run.settings, erasing_run.settings["tolerance"]
    height, width, (least, most) = settings["height"], settings["width"], settings["ratio"]     # of height / width
    numbers = ops.uniform(tf.constant([5, 6]), [10 * tolerance["draws_at_least"], 22])
    box = mixture.erasing_box(numbers, height, width, settings["scale"], (1.0 / most, 1.0 / least))
    top, bottom, left, right = (edge.numpy().astype(np.float64) for edge in box)
    some, random = bottom > top, np.random.default_rng(0)
    box_height, box_width = (bottom - top)[some], (right - left)[some]

    def spread(sides):
        return sides + random.random(len(sides)) - 0.5

    for key, values, bound in [("area", box_height * box_width / (height * width), tolerance["area"]),
                               ("log_aspect_h_over_w", np.log(spread(box_height) / spread(box_width)),
                                tolerance["log_aspect"])]:
        np.testing.assert_allclose(rows(values, settings), erasing_run[key], rtol=0, atol=bound, err_msg=key)


@pytest.fixture(**of_runs("mixing"))
def mixing(request):
    return request.param


def test_mixing(mixing):
    settings, inputs = mixing.settings, dict(mixing.settings["inputs"])
    images = getattr(weights, inputs.pop("function"))(**inputs)
    assert f"{zlib.crc32(np.float32(images).tobytes()):08x}" == settings["inputs_crc32"]
    images, side = tf.constant(images, tf.float32), settings["image_size"]
    targets = mixture.smooth(tf.constant(settings["targets"]), settings["classes"], settings["label_smoothing"])

    def check(value, key):
        np.testing.assert_allclose(value, mixing[key], rtol=0, atol=settings["tolerance"]["all"], err_msg=key)

    for case in settings["cases"]:
        i, top, bottom, left, right = case["index"], *case["box_y0y1x0x1"]
        box, ratio = tuple(tf.constant(edge) for edge in (top, bottom, left, right)), tf.constant(case["lam"])
        check(ratio, f"mixup{i}/lam_used")
        check(mixture.mix(images, ratio), f"mixup{i}/x")
        check(mixture.mix(targets, ratio), f"mixup{i}/y")
        left_over = mixture.ratio_of(box, side, side)
        check(left_over, f"cutmix{i}/lam_used")
        check(mixture.paste(images, box), f"cutmix{i}/x")
        check(mixture.mix(targets, left_over), f"cutmix{i}/y")
        check(mixture.erase(images, box, tf.fill(images.shape, settings["erase_value"])), f"erase{i}")


def test_boxes_of_a_ratio(mixing):
    side = mixing.settings["image_size"]
    for ratio, row, column, *edges in mixing["rand_bbox_lam_cy_cx_y0_y1_x0_x1"]:
        sides = mixture.cut_sides(tf.constant(ratio, tf.float32), side, side)
        assert [int(edge) for edge in mixture.box_round(int(row), int(column), sides, side, side)] == edges
