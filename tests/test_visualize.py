"""Pictures show what the files hold: pixels, numbers and neighbours are found again in what was drawn."""

import base64
import html.parser
import io
import json
import sys

import matplotlib.colors
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf import cli
from moco_tf import config as configs
from moco_tf.callbacks import Checkpoints
from moco_tf.data.sources import Folder
from moco_tf.errors import DataError, UsageError
from moco_tf.evaluation.encoders import Encoder
from moco_tf.train import build_method, evaluation_recipe, open_data, open_workdir, view_recipe
from moco_tf.visualize.figures import AGREES, DISAGREES, UNKNOWN, apart, fit, installed, png, running_mean
from moco_tf.visualize.report import contents, report
from moco_tf.visualize.show import (principal_components, read_metrics, show_curves, show_map, show_neighbours,
                                    show_views)

SMALL = {"views.size": 8, "batch_size": 100, "bn_group_size": 50, "method.queue_size": 400}


@pytest.fixture(scope="module")
def config():
    return configs.override(configs.load("smoke"), **SMALL)


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory):
    """A run that has saved its initial weights and logged two steps, and a probe of it."""
    path = tmp_path_factory.mktemp("runs") / "a run"
    open_workdir(config, str(path), 10000)
    Checkpoints(build_method(config, 1), f"{path}/checkpoints").save(0)
    log(path / "metrics.jsonl", [{"step": 1, "epoch": 0, "loss": 5.5}, {"step": 2, "epoch": 0, "loss": 5.25}])
    (path / "results.json").write_text(json.dumps({"knn_top1_final": 0.765432, "versions": {"numpy": "1.2.3"}}))
    (path / "linear").mkdir()
    (path / "linear" / "results.json").write_text(json.dumps(
        {"class_names": ["<cat>", "dog"], "confusion": [[31, 7], [0, 44]], "grid": [{"lr": 0.5}, {"lr": None}]}))
    log(path / "linear" / "monitor.jsonl", [{"step": 9, "top1": 0.5}])
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 12 images of noise, 9 x 9; val/ has four of them again, 02 in the wrong class, and eight new."""
    root = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (32, 9, 9, 3), dtype=np.uint8)
    places = [f"train/{'ab'[i // 12]}/{i:02d}" for i in range(24)]
    places += [f"val/{'ab'[i % 2]}/{i:02d}" for i in range(24, 32)]
    for i, place in zip([*range(32), 0, 1, 2, 12], [*places, "val/a/00", "val/a/01", "val/b/02", "val/b/12"]):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise[i]).save(f"{root / place}.png")
    return root


@pytest.fixture
def encoder():
    """The pixels themselves, as features."""
    return Encoder("pixels", "pixels", {"backbone": tf.keras.layers.Flatten()}, lambda images: images / 255 - 0.5, 8)


def log(path, records, rest=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)


def pixels(figure):
    return np.array(Image.open(io.BytesIO(png(figure))).convert("RGB"))


def places_of(image, picture):
    """(row, column) of every exact occurrence of an image, in reading order."""
    height, width = image.shape[:2]
    found = []
    for y in range(len(picture) - height + 1):
        line, first = picture[y].tobytes(), image[0].tobytes()
        x = line.find(first)
        while x >= 0:
            if x % 3 == 0 and np.array_equal(picture[y:y + height, x // 3:x // 3 + width], image):
                found.append((y, x // 3))
            x = line.find(first, x + 1)
    return found


def seen(source, index):
    """An image as the encoder gets it."""
    image = source.decode({"index": index})["image"]
    return evaluation_recipe(8, source).apply(image, tf.constant([0, 0]))["image"].numpy()


def enlarged(image, cell=112):
    factor = cell // len(image)
    return np.kron(image, np.ones((factor, factor, 1), np.uint8))


# ---------------------------------------------------------------------------------------------- sheets

def test_views_are_those_of_the_recipe_pixel_for_pixel(config):
    picture = pixels(show_views(config, count=2, draws=3))
    recipe, (source, _) = view_recipe(config), open_data(config)
    lefts = []
    for i, example in enumerate(source.examples(0, 0).take(2)):
        image = source.decode(example)["image"]
        drawn = [recipe.apply(image, tf.constant([i, draw])) for draw in range(3)]
        cells = [image.numpy(), *(views[name].numpy() for name in ("query", "key") for views in drawn)]
        columns = [places_of(enlarged(cell), picture)[0] for cell in cells]
        assert len({y for y, _ in columns}) == 1
        lefts.append([x for _, x in columns])
    assert lefts[0] == lefts[1] == sorted(set(lefts[0]))


def test_a_mixture_shows_the_same_draws_again_as_it_leaves_them(config):
    """Global mixtures that never come off leave all; a mask larger than the image covers it."""
    def picture(name, **options):
        own = configs.override(config, **{"mixture.name": name})
        for key, value in options.items():
            own = configs.with_option(own, f"mixture.{key}", str(value))
        return pixels(show_views(own, count=2, draws=3))

    source, _ = open_data(config)
    image = source.decode({"index": next(iter(source.examples(0, 0)))["index"]})["image"]
    query = view_recipe(config).apply(image, tf.constant([0, 1]))["query"].numpy()
    assert len(places_of(enlarged(query), picture("global", g_prob=0.0))) == 2
    masked = picture("cutout", mask_size=50, cutout_p=1.0, cutout_inside=True, mask_color=77.0)
    assert len(places_of(enlarged(query), masked)) == 1
    assert len(places_of(np.full((112, 112, 3), 77, np.uint8), masked)) == 2 * 2 * 3    # images, views, draws


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_reduced_in_their_shape():
    image = np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(fit(image, 112), np.kron(image, np.ones((4, 4, 1), np.uint8)))
    np.testing.assert_array_equal(fit(image, 50), image)
    grey = np.full((300, 150, 3), 77, np.uint8)
    np.testing.assert_array_equal(fit(grey, 100), np.full((100, 50, 3), 77))


def test_the_nearest_neighbour_of_a_query_is_its_own_duplicate(photos, encoder):
    train, held_out = Folder(str(photos), "train"), Folder(str(photos), "val")
    figure = show_neighbours(encoder, train, held_out, queries=12, k=3)
    picture = pixels(figure)
    assert sum(text.get_text() == "1.000" for text in figure.texts) == 4
    colours = {}
    for index in range(12):
        places = places_of(enlarged(seen(held_out, index)), picture)
        (row, left), = [place for place in places if place[1] < 112]
        again = [x for y, x in places if y == row and x > left]
        if again:
            assert again[0] < 2 * 150    # the first beside the query
            colours[held_out.describe(index)[-8:]] = matplotlib.colors.to_hex(picture[row, again[0] - 1] / 255)
    assert colours == {"a/00.png": AGREES, "a/01.png": AGREES, "b/02.png": DISAGREES, "b/12.png": AGREES}


def test_a_training_image_is_no_neighbour_of_its_own(photos, encoder):
    train = Folder(str(photos), "train")
    figure = show_neighbours(encoder, train, None, queries=4, k=23)
    assert "1.000" not in [text.get_text() for text in figure.texts]
    assert len(places_of(enlarged(seen(train, 5)), pixels(figure))) == 4    # once in every row


def test_unlabelled_neighbours_have_neutral_frames(photos, encoder):
    train, held_out = Folder(str(photos), "train/a"), Folder(str(photos), "val")
    picture = pixels(show_neighbours(encoder, train, held_out, queries=2, k=2))
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)[::7].tolist()}
    unknown, *others = (tuple(np.round(255 * np.array(matplotlib.colors.to_rgb(name))))
                        for name in (UNKNOWN, AGREES, DISAGREES))
    assert unknown in colours and not colours.intersection(others)


def test_more_neighbours_than_images_are_refused(photos, encoder):
    train, held_out = Folder(str(photos), "train"), Folder(str(photos), "val")
    for arguments in (dict(queries=13), dict(queries=2, k=25), dict(queries=2, k=24, split="train"),
                      dict(queries=2, k=8, bank=7)):
        with pytest.raises(UsageError, match="as many images"):
            show_neighbours(encoder, train, held_out, **arguments)


def test_an_encoder_that_has_diverged_is_refused(photos):
    lost = Encoder("lost", "lost", {"backbone": tf.keras.layers.Flatten()}, lambda images: images / 0 - images / 0, 8)
    with pytest.raises(DataError, match="finite"):
        show_map(lost, Folder(str(photos), "train"), None)


# ---------------------------------------------------------------------------------------------- maps

def test_principal_components_are_those_of_the_singular_values():
    rows = np.random.default_rng(0).normal(size=(60, 9)) * np.arange(1, 10)
    plane, shares = principal_components(rows)
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(plane), np.abs(left[:, :2] * values[:2]), rtol=1e-8)
    np.testing.assert_allclose(shares, values[:2] ** 2 / np.sum(values ** 2))


def test_a_map_shows_every_point_twice_and_names_the_classes(photos, encoder):
    figure = show_map(encoder, Folder(str(photos), "val"), Folder(str(photos), "train"), points=20)
    for axes in figure.axes:
        assert sum(len(scatter.get_offsets()) for scatter in axes.collections) == 20
        assert sorted(text.get_text() for text in axes.texts) == ["a", "b"]
    with pytest.raises(UsageError, match="at least 10"):
        show_map(encoder, Folder(str(photos), "val"), None, points=9)


def test_names_on_a_map_do_not_cover_each_other():
    places = np.array([[0., 0.], [0.01, 0.01], [0., 0.02], [3., 0.]])
    moved = apart(places, ["first", "second", "third", "far"], np.array([4., 4.]))
    np.testing.assert_array_equal(moved[:, 0], places[:, 0])
    np.testing.assert_array_equal(moved[[0, 3]], places[[0, 3]])
    heights = np.sort(moved[:3, 1])
    assert np.all(np.diff(heights) >= 0.1)    # 0.14 inch of 4.6, on a map of 4 units: 0.12


# ---------------------------------------------------------------------------------------------- curves

def lines_of(figure):
    """{title of a panel: [(steps, values)]}."""
    return {axes.get_title(loc="left"): [line.get_data() for line in axes.lines if len(line.get_xdata()) != 2 or
                                         list(line.get_xdata()) != [0, 1]] for axes in figure.axes}


def test_curves_are_the_numbers_in_the_files(tmp_path, config):
    run, probe = tmp_path / "run", tmp_path / "probe"
    log(run / "metrics.jsonl", [{"step": step, "epoch": 0, "loss": 6.0 / step, "accuracy": step / 10, "bad_steps": 0.0,
                                 "note": "text", "odd_thing": step} for step in (1, 2, 3)], rest='{"step": 4, "lo')
    log(run / "monitor.jsonl", [{"step": 0, "knn_top1": 0.25, "done": True}, {"step": 3, "knn_top1": 0.5}])
    (run / "config.json").write_text(configs.to_json(config))
    log(probe / "metrics.jsonl", [{"step": 1, "loss": float("nan"), "top1": 0.5, "top5": 0.75}, {"nothing": 1}])
    drawn = lines_of(show_curves([str(run), str(probe)]))
    assert set(drawn) == {"loss", "accuracy on training batches", "kNN accuracy, held-out images",
                          "accuracy, held-out images", "odd thing"}
    np.testing.assert_array_equal(drawn["loss"][0], ([1, 2, 3], [6, 3, 2]))
    np.testing.assert_array_equal(drawn["kNN accuracy, held-out images"], [([0, 3], [0.25, 0.5])])
    np.testing.assert_array_equal(drawn["accuracy, held-out images"], [([1], [0.5]), ([1], [0.75])])
    np.testing.assert_array_equal(drawn["odd thing"], [([1, 2, 3], [1, 2, 3])])
    png(show_curves([str(run), str(probe)]))


def test_the_loss_of_chance_is_a_level_where_the_run_has_logged_it(tmp_path):
    """MoCo v3's and NCE's are no ln(K + 1); runs of before, and probes, may have none."""
    for name, chance in (("v3", {"chance_loss": 6.65}), ("nce", {"chance_loss": 10.32}), ("again", {"chance_loss": 6.65}),
                         ("old", {})):
        log(tmp_path / name / "metrics.jsonl", [{"step": step, "loss": 7.0, **chance} for step in (1, 2)])
    figure = show_curves([str(tmp_path / name) for name in ("v3", "nce", "again", "old")])
    loss, = figure.axes    # and no curve of it
    assert [text.get_text() for text in loss.texts] == ["chance 6.65", "chance 10.32"]
    assert [line.get_ydata()[0] for line in loss.lines[4:]] == [6.65, 10.32] and len(loss.lines) == 6
    assert not show_curves([str(tmp_path / "old")]).axes[0].texts


def test_long_curves_are_smoothed_by_means_of_neighbours():
    np.testing.assert_allclose(running_mean(np.array([1., 3., 5., 10.]), 2), [2, 4, 7.5])


def test_a_run_without_metrics_is_refused(tmp_path, config):
    with pytest.raises(UsageError, match="config.json"):
        read_metrics(str(tmp_path))
    (tmp_path / "config.json").write_text(configs.to_json(config))
    with pytest.raises(UsageError, match="log.every_steps"):
        read_metrics(str(tmp_path))


# ---------------------------------------------------------------------------------------------- the report

class Page(html.parser.HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.references, self.text = [], [], ""
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data + "\n"


def test_the_report_is_one_file_with_everything_in_it(workdir, config, photos):
    page = Page(report(str(workdir), configs.override(config, **{"data.name": "folder", "data.path": str(photos)})))
    assert {"script", "link", "iframe", "a"}.isdisjoint(page.tags)
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in page.text and "url(" not in page.text and "@import" not in page.text
    assert len(page.references) == 5    # curves of the run and of the probe, views, neighbours, map
    for reference in page.references:
        assert min(Image.open(io.BytesIO(base64.b64decode(reference.partition(",")[2]))).convert("RGB").size) > 200
    for words in ("a run", "smoke", "0.765432", "1.2.3", "method.queue_size", "linear/results.json", "<cat>", "44"):
        assert words in page.text
    assert "1024" in page.text    # the recipe's queue, beside the run's


def test_what_cannot_be_drawn_says_why(workdir, config):
    gone = configs.override(config, **{"data.name": "folder", "data.path": "/nothing/here"})
    page = Page(report(str(workdir), gone))
    assert len(page.references) == 2 and page.text.count("/nothing/here") == 3


def test_json_becomes_tables():
    shown = Page(contents({"top1": 0.123456789, "deep": {"er": None}, "grid": [{"lr": 1, "top1": 0.5}, {"lr": 2}],
                           "many": list(range(1000))}))
    assert shown.text.split() == ("top1 0.123457 deep.er none grid: 2 lr top1 1 0.5 2 none "
                                  "many: 1000 More than a page shows; it is in the file.").split()


# ---------------------------------------------------------------------------------------------- the command

@pytest.mark.parametrize("arguments, words", [
    ([], ["views", "report"]),
    (["viws", "smoke"], ["views"]),
    (["views"], ["nothing", "recipe"]),
    (["views", "smok"], ["smoke"]),
    (["views", "{tmp}"], ["{tmp}", "config.json"]),
    (["views", "moco_v2_r50"], ["data.path"]),
    (["views", "linear_v1v2"], ["data.name"]),
    (["views", "smoke", "--config.veiws.size=3"], ["views.size"]),
    (["curves", "{tmp}"], ["{tmp}", "config.json"]),
    (["curves", "{run}", "--config.seed=1"], ["no config"]),
    (["map", "{tmp}"], ["{tmp}", "none of these"]),
    (["map", "{run}", "{run}"], ["one workdir"]),
    (["report", "{tmp}"], ["config.json"]),
    (["neighbours", "{run}", "--k=10001"], ["10001"]),
    (["neighbours", "{run}", "--queries=0"], ["queries"])])
def test_wrong_calls_get_one_line(arguments, words, tmp_path, workdir, capsys):
    names = dict(tmp=tmp_path, run=workdir)
    assert cli.main(["show", *(argument.format(**names) for argument in arguments)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("moco-tf: ") and all(word.format(**names) in last for word in words), last


def test_pictures_go_where_they_are_asked_for_or_into_the_workdir(workdir, tmp_path, capsys):
    assert cli.main(["show", "curves", str(workdir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{workdir}/figures/curves.png"
    assert cli.main(["show", "views", "smoke", "--config.views.size=8", f"--out={tmp_path}/new/v.png"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{tmp_path}/new/v.png"
    for path in (f"{workdir}/figures/curves.png", f"{tmp_path}/new/v.png"):
        assert Image.open(path).format == "PNG"


def test_missing_packages_are_named(workdir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UsageError, match=r"pip install 'moco_tf\[plots\]'"):
        installed("sklearn.manifold")
    for name in [name for name in sys.modules if name.startswith("moco_tf.visualize")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["show", "curves", str(workdir)]) == 2
    assert "pip install 'moco_tf[plots]'" in capsys.readouterr().err.splitlines()[-1]
