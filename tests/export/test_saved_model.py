"""`moco-tf export`: what is loaded elsewhere computes what the run's encoder does, learns, and is there whole or not.

Most tests look at what one process without moco_tf found with the exports of a ResNet, of a vision transformer and of
CMC's two ResNets (use_export.py).
"""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from conftest import ROOT
from moco_tf import config as configs
from moco_tf.callbacks import Checkpoints
from moco_tf.cli import main
from moco_tf.data.pipeline import evaluation_batches
from moco_tf.data.sources import open_source
from moco_tf.errors import DataError, UsageError
from moco_tf.evaluation.classifier import FineTuning
from moco_tf.evaluation.encoders import METADATA, open_encoder
from moco_tf.export import saved_model
from moco_tf.export.exchange import exchange
from moco_tf.export.saved_model import export
from moco_tf.train import build_method, compile_method, evaluation_recipe, open_workdir

ALL = ("saved_model", "keras", "weights", "tflite")
BATCH = 6
SIDES = {"resnet": 32, "vit": 28, "cmc": 64}


def make_run(path, name, **values):
    """A workdir whose weights and statistics all differ from the initial ones, between query and key encoder too."""
    config = configs.override(configs.load(name), **values)
    method = build_method(config, steps_per_epoch=10)
    rng = np.random.default_rng(0)
    for model in (method.encoder, getattr(method, "key_encoder", method.encoder)):
        model.set_weights([np.abs(w + 0.1 * rng.normal(size=w.shape)) if w.ndim == 1 else
                           w * (1.0 + 0.1 * rng.normal(size=w.shape)) for w in model.get_weights()])
    open_workdir(config, path)
    Checkpoints(method, f"{path}/checkpoints").save(5)
    pathlib.Path(path, "results.json").write_text(json.dumps({"knn_top1_final": 0.75}))
    pathlib.Path(path, "monitor.jsonl").write_text('{"step": 0, "knn_top1": 0.5}\n{"step": 5, "knn_top1": 0.75}\n')
    return path


def smooth(height, width, seed):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """JPEGs and PNGs, larger and smaller than the ResNet's images, upright and not, one grey."""
    folder = tmp_path_factory.mktemp("photos")
    for i, (height, width) in enumerate([(50, 71), (90, 41), (33, 200), (20, 25)]):
        smooth(height, width, i).save(folder / f"{i}.jpg", quality=90)
    smooth(64, 48, 9).convert("L").save(folder / "4.png")
    return str(folder)


@pytest.fixture(scope="module")
def resnet(photos, tmp_path_factory):
    return make_run(str(tmp_path_factory.mktemp("resnet") / "run"), "smoke", **{
        "views.size": 32, "backbone.stem": "imagenet", "bn_group_size": BATCH,
        "data.name": "folder", "data.path": photos})


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return make_run(str(tmp_path_factory.mktemp("vit") / "run"), "moco_v3_vit_tiny_quickstart", **{
        "backbone.dim": 24, "backbone.depth": 2, "head.hidden_dim": 32})


@pytest.fixture(scope="module")
def cmc(photos, tmp_path_factory):
    return make_run(str(tmp_path_factory.mktemp("cmc") / "run"), "cmc_r50_v1", **{
        "views.size": 64, "backbone.depth": 18, "backbone.width": 0.125, "backbone.stem_channels": 16,
        "method.bank_size": 10, "method.num_negatives": 5, "bn_group_size": BATCH, "data.path": photos})


@pytest.fixture(scope="module")
def facts(resnet, vit, cmc):
    """Of the exports of all, into the workdirs."""
    return {name: export(path, formats=ALL) for name, path in (("resnet", resnet), ("vit", vit), ("cmc", cmc))}


def normalised_lab(rgb):
    """CMC's input from RGB in [0, 1], in float64."""
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    xyz = linear @ np.transpose([(0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169),
                                 (0.019334, 0.119193, 0.950227)])
    x, y, z = np.moveaxis(xyz / (0.95047, 1.0, 1.08883), -1, 0)
    x, y, z = (np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116) for t in (x, y, z))
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
    return ((lab - (50, 6.025, -6.6895)) / (50, 92.208, 101.1675)).astype(np.float32)


def small_images():
    """The contents of PNGs of the first embedded held-out images."""
    source, contents = open_source("embedded", split="val"), []
    for example in source.examples().take(4):
        content = io.BytesIO()
        Image.fromarray(source.decode(example)["image"].numpy()).save(content, "PNG")
        contents.append(content.getvalue())
    return contents


@pytest.fixture(scope="module")
def inputs(resnet, vit, cmc, photos):
    rng = np.random.default_rng(1)
    levels = {name: rng.integers(0, 256, (BATCH, side, side, 3)) for name, side in SIDES.items()}
    contents = [path.read_bytes() for path in sorted(pathlib.Path(photos).iterdir())]
    return {
        "resnet": f"{resnet}/export", "vit": f"{vit}/export", "cmc": f"{cmc}/export", "levels": levels,
        **{f"{name}_images": (value / 255).astype(np.float32) for name, value in levels.items()},
        "resnet_bytes": np.array(contents), "vit_bytes": np.array(small_images()), "cmc_bytes": np.array(contents),
        "cmc_lab": normalised_lab(levels["cmc"] / 255),
        "wide": rng.uniform(size=(2, 64, 96, 3)).astype(np.float32),
        "resnet_target": rng.normal(size=(BATCH, 32)).astype(np.float32),
        "vit_target": rng.normal(size=(BATCH, 24)).astype(np.float32),
        "cmc_target": rng.normal(size=(BATCH, 128)).astype(np.float32),
        "mean": np.full(3, 0.286), "std": np.full(3, 0.353)}


@pytest.fixture(scope="module")
def found(facts, inputs, tmp_path_factory):
    """What use_export.py found, in a process of its own, in an empty folder, without moco_tf."""
    folder = tmp_path_factory.mktemp("elsewhere")
    np.savez(folder / "in.npz", **{name: value for name, value in inputs.items() if name != "levels"})
    script = pathlib.Path(__file__).with_name("use_export.py")
    done = subprocess.run([sys.executable, "-I", str(script), "in.npz", "out.npz"], cwd=folder, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(folder / "out.npz")


@pytest.fixture(scope="module")
def encoders(resnet, vit, cmc):
    return {"resnet": open_encoder(resnet), "vit": open_encoder(vit), "cmc": open_encoder(cmc)}


EACH = pytest.mark.parametrize("name", SIDES)


@EACH
def test_the_export_computes_what_the_run_s_encoder_computes(name, encoders, inputs, found):
    levels = inputs["levels"][name].astype(np.uint8)
    expected = encoders[name].rows(levels).numpy()
    for ours in ("call", "features"):
        np.testing.assert_allclose(found[f"{name}_{ours}"], expected, atol=1e-5)
    np.testing.assert_allclose(found[f"{name}_one"], expected[:1], atol=1e-5)
    np.testing.assert_allclose(found[f"{name}_embedding"], encoders[name].rows(levels, "embedding").numpy(), atol=1e-5)


@EACH
def test_encoded_images_are_seen_as_evaluation_sees_them(name, encoders, photos, found):
    """Files of other sizes by the 256 to 224 rule; small images, where a run's data are such, as a whole."""
    source = open_source("embedded", split="val") if name == "vit" else open_source("folder", photos)
    batches = evaluation_batches(source, evaluation_recipe(encoders[name].size, source), 2)
    count = len(found[f"{name}_serving"])
    rows = [encoders[name].rows(views["image"])[real] for views, _, _, real in batches.take((count + 1) // 2)]
    np.testing.assert_allclose(found[f"{name}_serving"], np.concatenate(rows), atol=1e-4)
    assert count >= 4 and np.std(found[f"{name}_serving"], axis=0).max() > 1e-2


def test_pyramid_has_the_strides_4_to_32_at_any_size(found):
    shapes = [found[f"resnet_{level}"].shape for level in ("C2", "C3", "C4", "C5")]
    assert shapes == [(2, 16, 24, 4), (2, 8, 12, 8), (2, 4, 6, 16), (2, 2, 3, 32)]


def test_features_are_the_mean_of_the_last_map(inputs, facts, resnet):
    loaded = tf.saved_model.load(f"{resnet}/export")
    images = tf.constant(inputs["wide"])
    maps = loaded.signatures["pyramid"](images=images)
    np.testing.assert_allclose(tf.reduce_mean(maps["C5"], (1, 2)), loaded(images), atol=1e-6)


def test_tokens_are_the_class_token_and_the_patches_in_place(found, encoders, inputs):
    np.testing.assert_array_equal(found["vit_class_token"], found["vit_features"])
    patches = found["vit_patches"]
    assert patches.shape == (BATCH, 4, 4, 24)
    np.testing.assert_allclose(found["vit_mean_of_patches"], patches.mean((1, 2)), atol=1e-6)
    backbone = encoders["vit"].models["backbone"]
    tokens = tf.keras.Model(backbone.input, backbone.get_layer("norm").output)
    expected = tokens(encoders["vit"].normalize(inputs["levels"]["vit"]), training=False)[:, 1:].numpy()
    np.testing.assert_allclose(patches[:, 2, 1], expected[:, 4 * 2 + 1], atol=1e-5)    # row by row


@EACH
@pytest.mark.parametrize("training", [False, True])
def test_a_gradient_step_changes_all_variables_and_lowers_the_loss(name, training, found):
    assert found[f"{name}_changed_{training}"].all() and len(found[f"{name}_changed_{training}"]) > 20
    before, after = found[f"{name}_losses_{training}"]
    assert after < before


def test_moving_statistics_move_in_training_only_and_as_the_run_s(found, resnet, inputs):
    assert not found["resnet_moved_False"].any()
    assert found["resnet_moved_True"].all() and len(found["resnet_moved_True"]) == 2 * 20
    encoder = open_encoder(resnet)
    backbone = encoder.models["backbone"]
    backbone(encoder.normalize(inputs["levels"]["resnet"]), training=True)    # the batch is one BatchNorm group
    expected = np.concatenate([v.numpy() for v in backbone.variables if "moving_" in v.name])
    np.testing.assert_allclose(found["resnet_statistics"], expected, atol=1e-5)


def test_a_frozen_patch_convolution_stays_frozen(vit):
    loaded = tf.saved_model.load(f"{vit}/export")
    frozen = {v.name for v in loaded.variables} - {v.name for v in loaded.trainable_variables}
    assert any("patch_embed.proj" in name for name in frozen) and len(frozen) == 3    # kernel, bias, positions


def test_a_signature_is_a_layer_that_learns(found):
    losses = found["layer_losses"]
    assert losses[-1] < losses[0] and found["layer_variables"] == 3 * 20    # kernel, gamma, beta


def test_the_backbone_loads_as_a_keras_model_of_plain_layers(found, encoders, inputs):
    expected = encoders["resnet"].rows(inputs["levels"]["resnet"].astype(np.uint8)).numpy()
    for ours in ("keras", "weights"):
        np.testing.assert_allclose(found[ours], expected, atol=1e-5)
    assert "BatchNormalization" in found["keras_layers"] and hasattr(tf.keras.layers, "BatchNormalization")
    assert all(hasattr(tf.keras.layers, name) for name in found["keras_layers"])


@EACH
def test_tflite_is_close_and_takes_any_batch(name, found, facts):
    """Half precision keeps eleven bits of each weight; a few parts in a thousand of the largest feature are left."""
    expected = found[f"{name}_features"]
    bound = 5e-3 * np.abs(expected).max()
    np.testing.assert_allclose(found[f"{name}_lite_{BATCH}"], expected, atol=bound)
    np.testing.assert_allclose(found[f"{name}_lite_1"], expected[:1], atol=bound)
    assert facts[name]["formats"]["tflite"]["bytes"] < 0.7 * facts[name]["formats"]["weights"]["bytes"]


# ---------------------------------------------------------------------------------------------- CMC

def test_a_colour_space_is_entered_without_rounding_and_the_halves_are_joined(cmc, encoders, inputs, found):
    backbone = encoders["cmc"].models["backbone"]
    np.testing.assert_allclose(found["cmc_features"], backbone(inputs["cmc_lab"], training=False), atol=1e-4)
    between = np.random.default_rng(3).uniform(size=(2, 64, 64, 3)).astype(np.float32)    # no whole levels
    np.testing.assert_allclose(tf.saved_model.load(f"{cmc}/export")(between),
                               backbone(normalised_lab(between.astype(np.float64)), training=False), atol=1e-4)
    halves = [found["cmc_l_to_ab_features"], found["cmc_ab_to_l_features"]]
    np.testing.assert_array_equal(np.concatenate(halves, axis=1), found["cmc_features"])
    assert found["cmc_C2"].shape == (BATCH, 16, 16, 16) and found["cmc_C5"].shape == (BATCH, 2, 2, 128)
    np.testing.assert_allclose(found["cmc_C5"].mean((1, 2)), found["cmc_features"], atol=1e-5)


def test_a_half_sees_its_own_channels_only(cmc, facts, inputs):
    """Grey images of three levels differ in luminance and in nothing else."""
    half = tf.saved_model.load(f"{cmc}/export").signatures
    grey = np.repeat(np.linspace(0.2, 0.8, 3)[:, None, None, None], 64, 1).repeat(64, 2).repeat(3, 3).astype(np.float32)
    spreads = {name: np.std(half[name](images=tf.constant(grey))["features"], axis=0).max()
               for name in ("l_to_ab", "ab_to_l")}
    assert spreads["l_to_ab"] > 1e-2 and spreads["ab_to_l"] < 1e-3


def test_the_keras_file_takes_images_in_the_colour_space(found):
    np.testing.assert_allclose(found["cmc_keras"], found["cmc_features"], atol=1e-4)
    assert all(hasattr(tf.keras.layers, name) or name == "SlicingOpLambda" for name in found["cmc_keras_layers"])


def test_the_metadata_say_which_colour_space(facts):
    told = facts["cmc"]["preprocessing"]
    assert told["input"] == "RGB in [0, 1]" and told["space"] == "Lab"
    assert told["mean"] == [50, 6.025, -6.6895] and told["std"] == [50, 92.208, 101.1675]
    assert set(facts["cmc"]["signatures"]) == {
        "features", "embedding", "pyramid", "l_to_ab", "ab_to_l", "serving_bytes"}


# ---------------------------------------------------------------------------------------------- what is said

def test_the_metadata_say_where_it_is_from_and_what_it_takes(facts, resnet, vit, encoders, found):
    with open(f"{resnet}/export/{METADATA}") as file:
        written = json.load(file)
    assert written == json.loads(json.dumps(facts["resnet"]))
    assert written["step"] == 5 and written["side"] == "query"
    assert written["widths"] == {"features": 32, "embedding": 16}
    assert written["preprocessing"] == {
        "input": "RGB in [0, 1]", "size": 32, "shorter_side": 36, "whole_up_to": 0,
        "interpolation": "bilinear, antialiased", "space": None, "mean": [0.286] * 3, "std": [0.353] * 3}
    assert facts["vit"]["preprocessing"]["shorter_side"] == 32 and facts["vit"]["preprocessing"]["whole_up_to"] == 28
    np.testing.assert_allclose(found["vit_constants"], [28, 32, 0.286, 0.286, 0.286], rtol=1e-6)
    assert written["signatures"]["pyramid"] == {
        "C2": [None, 8, 8, 4], "C3": [None, 4, 4, 8], "C4": [None, 2, 2, 16], "C5": [None, 1, 1, 32]}
    assert written["metrics"]["results"]["knn_top1_final"] == 0.75 and written["metrics"]["monitor"]["step"] == 5
    assert written["fingerprint"] == encoders["resnet"].fingerprint()
    assert written["config"] == json.loads(configs.to_json(encoders["resnet"].config))
    assert written["versions"]["tensorflow"] == tf.__version__
    assert written["formats"]["saved_model"]["largest_difference"] < 1e-5
    learnt = encoders["resnet"].models["embedding"].trainable_weights
    assert written["parameters"] == {"trainable": sum(int(tf.size(w)) for w in learnt), "other": 2 * sum(
        int(w.shape[0]) for w in learnt if "gamma" in w.name)}


def test_the_command_prints_what_it_wrote(resnet, tmp_path, capsys):
    assert main(["export", f"--encoder={resnet}", f"--out={tmp_path / 'out'}", "--side=key", "--size=64"]) == 0
    printed = capsys.readouterr().out
    assert "key encoder at step 5" in printed and "differ from the training model's by at most" in printed
    assert "signature pyramid: C2 (B, 16, 16, 4)" in printed and "signature serving_bytes: features (B, 32)" in printed
    key = open_encoder(resnet, side="key", size=64)
    images = np.random.default_rng(2).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    np.testing.assert_allclose(loaded((images / 255).astype(np.float32)), key.rows(images), atol=1e-5)
    assert len(loaded.trainable_variables) > 40    # though a momentum encoder's are not


# ---------------------------------------------------------------------------------------------- sides of it

def test_bfloat16_computes_in_it_between_float32_ends(vit, tmp_path, encoders, inputs):
    facts = export(vit, str(tmp_path / "out"), precision="bfloat16", formats=("saved_model", "keras"))
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    images = tf.constant(inputs["vit_images"])
    features = loaded(images)
    assert features.dtype == tf.float32 and {v.dtype for v in loaded.variables} == {tf.float32}
    expected = encoders["vit"].rows(inputs["levels"]["vit"]).numpy()
    difference = np.abs(features - expected).max() / np.abs(expected).max()
    assert 1e-4 < difference < 3e-2    # eight bits, through a dozen layers
    assert facts["formats"]["keras"]["largest_difference"] > 1e-4
    assert tf.keras.mixed_precision.global_policy().name == "float32"    # as before


@pytest.mark.torch
def test_a_file_of_weights_is_exported_as_the_run_is(resnet, encoders, tmp_path, inputs):
    source = str(tmp_path / "moco.safetensors")
    exchange(resnet, source)
    with pytest.raises(UsageError, match="with --out"):
        export(source)
    facts = export(source, str(tmp_path / "whole"), size=32)
    assert facts["step"] is None and facts["widths"] == {"features": 32, "embedding": 16}
    mean, std = (np.array(facts["preprocessing"][name], np.float32) for name in ("mean", "std"))
    images = (inputs["resnet_images"] - 0.286) / 0.353 * std + mean    # normalised by the recipe that the file gets
    loaded = tf.saved_model.load(str(tmp_path / "whole"))
    np.testing.assert_allclose(loaded(tf.constant(images, tf.float32)),
                               encoders["resnet"].rows(inputs["levels"]["resnet"]), atol=1e-4)

    backbone = str(tmp_path / "backbone.safetensors")
    exchange(source, backbone, "torchvision")
    facts = export(backbone, str(tmp_path / "backbone"), size=32, formats=("weights",))
    assert set(facts["signatures"]) == {"features", "pyramid", "serving_bytes"} and set(facts["widths"]) == {"features"}
    with pytest.raises(UsageError, match="must hold a key encoder"):
        export(backbone, str(tmp_path / "none"), side="key")
    assert not os.path.exists(tmp_path / "none")


def test_a_fine_tuned_backbone_is_opened_and_exported_as_it_became(resnet, encoders, inputs, tmp_path):
    path, images = str(tmp_path / "run"), inputs["levels"]["resnet"].astype(np.uint8)
    config = configs.override(configs.load("finetune_quickstart"), **{
        "encoder": resnet, "views.size": 32, "data.name": "folder", "data.path": "nowhere"})
    begun = open_encoder(resnet)
    method = FineTuning(begun.models["backbone"], num_classes=3)
    method.build_on(begun.width)
    compile_method(method, config, steps_per_epoch=1)
    for variable in method.encoder.trainable_variables:
        variable.assign(1.5 * variable)
    open_workdir(config, path)
    with pytest.raises(UsageError, match="0 checkpoints"):
        open_encoder(path)
    Checkpoints(method, f"{path}/checkpoints").save(7)
    tuned = open_encoder(path)
    np.testing.assert_array_equal(tuned.rows(images), begun.rows(images))
    assert np.abs(tuned.rows(images) - encoders["resnet"].rows(images)).max() > 0.1
    assert tuned.step == 7 and set(tuned.models) == {"backbone"}
    export(path)
    np.testing.assert_allclose(tf.saved_model.load(f"{path}/export")(tf.constant(inputs["resnet_images"])),
                               begun.rows(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="side key"):
        open_encoder(path, side="key")


# ---------------------------------------------------------------------------------------------- whole or not at all

def files(folder):
    return sorted(str(path.relative_to(folder)) for path in pathlib.Path(folder).rglob("*"))


def test_an_export_that_ends_early_leaves_what_was_there(vit, tmp_path, monkeypatch):
    def dies(folder, model, preprocessing):
        assert files(folder)    # something was written already
        raise KeyboardInterrupt

    monkeypatch.setitem(saved_model.FORMATS, "keras", (dies, "nothing"))
    with pytest.raises(KeyboardInterrupt):
        export(vit, str(tmp_path / "out"), formats=("weights", "keras"))
    assert files(tmp_path) == []
    export(vit, str(tmp_path / "out"), formats=("weights",))
    before = {name: (tmp_path / name).stat() for name in files(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        export(vit, str(tmp_path / "out"), formats=("weights", "keras"), overwrite=True)
    assert {name: (tmp_path / name).stat() for name in files(tmp_path)} == before


def test_an_export_is_replaced_only_when_asked_and_other_folders_never(vit, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()    # what a killed export leaves
    (tmp_path / "out.partial" / "saved_model.pb").write_text("half")
    export(vit, str(out), formats=("weights",))
    with pytest.raises(UsageError, match="--overwrite"):
        export(vit, str(out), formats=("weights",))
    (out / "old").write_text("")
    export(vit, str(out), formats=("weights",), overwrite=True)
    assert files(tmp_path) == ["out", "out/backbone.weights.h5", f"out/{METADATA}"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(UsageError, match="something else"):
        export(vit, str(tmp_path / "mine"), formats=("weights",), overwrite=True)
    assert files(tmp_path / "mine") == ["thesis.tex"]


def test_object_stores_get_it_with_the_file_that_makes_it_a_model_last(vit, inputs, found, monkeypatch):
    """TensorFlow's file system in memory stands in for gs://."""
    export(vit, "ram://exports/vit")
    np.testing.assert_allclose(tf.saved_model.load("ram://exports/vit")(tf.constant(inputs["vit_images"])),
                               found["vit_call"], atol=1e-6)
    with pytest.raises(UsageError, match="--overwrite"):
        export(vit, "ram://exports/vit")
    copied = []
    monkeypatch.setattr(tf.io.gfile, "copy", lambda source, target: copied.append(os.path.basename(target)))
    saved_model._upload(f"{vit}/export", "ram://exports/vit")
    assert copied[0] == METADATA and copied[-1] == "saved_model.pb" and "variables.index" in copied
    assert not tf.io.gfile.exists("ram://exports/vit/saved_model.pb")    # the old one went first


@pytest.mark.parametrize("arguments, told", [
    (["--formats=onnx"], "saved_model, keras, weights, tflite"),
    (["--formats=tflite", "--precision=bfloat16"], "float32"),
    (["--out=results.json/out"], "can be written"),
    (["--size=30"], "28 or 35"),
    (["--encoder=nothing"], "nothing"),
    (["more"], "flags only")])
def test_wrong_calls_end_with_2_and_one_line_and_leave_nothing(vit, arguments, told, capsys, monkeypatch):
    monkeypatch.chdir(vit)
    before = files(vit)
    assert main(["export", "--encoder=.", "--out=new", *arguments]) == 2
    line, = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moco-tf: ") and told in line
    assert files(vit) == before


# ---------------------------------------------------------------------------------------------- opened again

def test_the_encoder_of_an_export_gives_the_rows_of_the_run_s(resnet, facts, encoders, inputs):
    opened, levels = open_encoder(f"{resnet}/export"), inputs["levels"]["resnet"].astype(np.uint8)
    assert opened.size == 32 and opened.width == 32 and opened.config is None
    for features in ("backbone", "embedding"):
        np.testing.assert_allclose(opened.rows(levels, features), encoders["resnet"].rows(levels, features), atol=1e-5)
    assert open_encoder(f"{resnet}/export", size=64).rows(np.zeros((2, 64, 64, 3), np.uint8)).shape == (2, 32)
    with pytest.raises(UsageError, match="workdir"):
        export(f"{resnet}/export", f"{resnet}/again")


def test_a_transformer_s_images_keep_their_size(vit, facts):
    assert open_encoder(f"{vit}/export").size == 28
    with pytest.raises(UsageError, match="28 pixels.*--size=35"):
        open_encoder(f"{vit}/export", size=35)


def test_the_encoder_of_an_export_can_be_trained_and_that_of_bare_signatures_not(resnet, facts, inputs, tmp_path):
    layer = open_encoder(f"{resnet}/export").models["backbone"]
    levels = tf.constant(inputs["resnet_images"])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(levels, training=True))
    gradients = tape.gradient(loss, layer.trainable_variables)
    assert len(gradients) == 60 and all(gradient is not None for gradient in gradients)
    bare = tf.Module()
    bare.kernel = tf.Variable(tf.ones((3, 5)))
    features = tf.function(lambda x: {"features": tf.reduce_mean(x, (1, 2)) @ bare.kernel},
                           [tf.TensorSpec((None, 8, 8, 3))])
    tf.saved_model.save(bare, str(tmp_path / "bare"), {"features": features})
    opened = open_encoder(str(tmp_path / "bare"))
    assert opened.size == 8 and opened.width == 5
    np.testing.assert_allclose(opened.rows(np.full((2, 8, 8, 3), 255, np.uint8)), np.full((2, 5), 3.0), rtol=1e-6)
    with pytest.raises(UsageError, match="training=True"):
        opened.rows(np.zeros((2, 8, 8, 3), np.uint8), training=True)


def test_models_without_what_is_needed_are_refused_in_one_line(tmp_path):
    def saved(name, **signatures):
        tf.saved_model.save(tf.Module(), str(tmp_path / name), {
            key: tf.function(function, [tf.TensorSpec(shape)]) for key, (function, shape) in signatures.items()})
        return str(tmp_path / name)

    with pytest.raises(UsageError, match="no signature"):
        open_encoder(saved("empty"))
    with pytest.raises(UsageError, match="serving_default"):
        open_encoder(saved("other", serving_default=(lambda x: {"y": x}, (None, 8, 8, 3))))
    with pytest.raises(UsageError, match=r"\(B, D\)"):
        open_encoder(saved("maps", features=(lambda x: {"features": x}, (None, 8, 8, 3))))
    broken = saved("broken", features=(lambda x: {"features": x[:, 0, 0]}, (None, 8, 8, 3)))
    with open(f"{broken}/saved_model.pb", "wb") as file:
        file.write(b"half")
    with pytest.raises(DataError, match="whole"):
        open_encoder(broken)
