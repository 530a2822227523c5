"""`moco-tf linear` and `moco-tf finetune` as processes: what they leave, resume, replicas, and bad input."""

import json
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from conftest import TINY, moco_tf
from runs import assert_same_run, final_state, lines, start_and_stop_at

SHORT = ["--config.epochs=2", "--config.batch_size=300", "--config.log.tensorboard=false", "--config.log.every_steps=1",
         "--config.optimizer.lr_per_256=0.1", "--config.checkpoint.every_steps=10"]    # 34 steps an epoch, the last short


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The workdir of a tiny run."""
    workdir = tmp_path_factory.mktemp("encoder") / "run"
    done = moco_tf("pretrain", f"--workdir={workdir}", *TINY, "--config.epochs=1")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def probe(encoder):
    done = moco_tf("linear", f"--encoder={encoder}", *SHORT)
    assert done.returncode == 0, done.stderr
    return encoder / "linear_v1v2", done


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


def test_a_probe_reports_accuracies_of_the_held_out_images(probe):
    workdir, done = probe
    results = json.loads((workdir / "results.json").read_text())
    confusion = np.array(results["confusion"])
    assert confusion.shape == (10, 10) and confusion.sum() == 2000 and results["steps"] == 68
    assert results["top1"] == pytest.approx(np.trace(confusion) / 2000)
    np.testing.assert_allclose(results["per_class"], np.diag(confusion) / confusion.sum(1))
    assert results["top5"] >= results["top1"] > 0.2 and results["backbone_unchanged"] is True
    measured = [line["top1"] for line in lines(workdir, "monitor.jsonl")]
    assert len(measured) == 2 and results["best_top1"] == max(measured) and results["top1"] == measured[-1]
    assert f"top-1 {results['top1']:.2%}" in done.stdout and "ETA" in done.stdout
    best = tf.train.load_checkpoint(tf.train.latest_checkpoint(str(workdir / "best")))
    assert any(value == [16, 10] or value == [32, 10] for value in best.get_variable_to_shape_map().values())


def test_a_killed_probe_ends_as_one_that_was_not(encoder, probe, tmp_path):
    code, _ = start_and_stop_at(45, ["linear", f"--encoder={encoder}", *SHORT], tmp_path / "run", signal.SIGKILL)
    assert code == -signal.SIGKILL
    done = moco_tf("linear", f"--workdir={tmp_path / 'run'}")    # the workdir names its encoder
    assert done.returncode == 0, done.stderr
    assert "resuming at step" in done.stdout
    assert_same_run(tmp_path / "run", probe[0])


def test_two_replicas_probe_as_one(encoder, probe, tmp_path):
    done = moco_tf("linear", f"--encoder={encoder}", f"--workdir={tmp_path / 'run'}", "--strategy=mirrored",
                   "--cpu_replicas=2", *SHORT)
    assert done.returncode == 0, done.stderr
    ours, expected = final_state(tmp_path / "run"), final_state(probe[0])
    kernel = next(name for name in expected if "classifier/kernel" in name and "OPTIMIZER" not in name)
    np.testing.assert_allclose(ours[kernel], expected[kernel], rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["replicas"] == 2


def test_a_saved_model_is_probed_on_two_replicas_as_its_run_is(encoder, probe, tmp_path):
    done = moco_tf("export", f"--encoder={encoder}", f"--out={tmp_path / 'export'}")
    assert done.returncode == 0, done.stderr
    done = moco_tf("linear", f"--encoder={tmp_path / 'export'}", f"--workdir={tmp_path / 'run'}", "--strategy=mirrored",
                   "--cpu_replicas=2", *SHORT, "--config.data.name=embedded", "--config.views.size=8")
    assert done.returncode == 0, done.stderr
    ours, expected = [json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "run", probe[0])]
    assert ours["backbone_unchanged"] and abs(ours["top1"] - expected["top1"]) < 0.01


def test_layers_are_probed_one_after_the_other(encoder):
    """Any ResNet's: the last numbered layer is the features that the other recipes probe."""
    done = moco_tf("linear", f"--encoder={encoder}", "--config=linear_cmc_r50", "--layers=1,6", *SHORT)
    assert done.returncode == 0, done.stderr
    widths = {1: 8 * 8 * 4, 6: 32}    # the stem's 4 channels of 8 x 8 pixels, and the features
    for layer, width in widths.items():
        workdir = encoder / "linear_cmc_r50" / f"layer{layer}"
        results = json.loads((workdir / "results.json").read_text())
        assert results["backbone_unchanged"] and results["steps"] == 68 and results["top1"] > 0.2
        assert f"layer {layer}, features of {width} values" in done.stdout and f"is in {workdir}" in done.stdout
        assert final_state(workdir)["method/classifier/kernel/.ATTRIBUTES/VARIABLE_VALUE"].shape == (width, 10)


def test_the_layer_of_the_config_is_probed_fast_too(encoder, tmp_path):
    done = moco_tf("linear", "--fast", f"--encoder={encoder}", "--config=linear_cmc_r50", "--config.layer=5", *SHORT,
                   "--config.fast.epochs=2", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dim"] == 32 and results["encoder"].endswith("layer 5")    # one pixel is left of 8


def test_an_encoder_that_changed_is_noticed(encoder, probe, tmp_path):
    shutil.copytree(encoder, tmp_path / "encoder")
    begun = tmp_path / "encoder" / "linear_v1v2"
    facts = json.loads((begun / "data.json").read_text())
    (begun / "data.json").write_text(json.dumps({**facts, "encoder": "0" * 64}))
    config = json.loads((begun / "config.json").read_text())
    done = moco_tf("linear", f"--workdir={begun}")
    assert config["encoder"] == str(encoder) and done.returncode == 2
    assert "weights have changed" in last_line(done)
    done = moco_tf("linear", "--fast", f"--encoder={encoder}", f"--workdir={encoder}", *SHORT)
    assert done.returncode == 2 and "holds another run" in last_line(done)


def test_fine_tuning_on_a_part_of_the_labels(encoder, tmp_path):
    done = moco_tf("finetune", f"--encoder={encoder}", f"--workdir={tmp_path / 'run'}", "--config=finetune_r50_10pct",
                   "--config.epochs=2", "--config.batch_size=100", "--config.log.tensorboard=false")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == 1000 and results["steps"] == 20 and results["top1"] > 0.2


def photographs(root, labelled=True):
    for split, count in (("train", 12), ("val", 4)):
        for i in range(count):
            folder = root / split / (str(i % 2) if labelled else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    return root


def test_bad_input_is_refused_in_one_line(encoder, tmp_path):
    def fails(code, *arguments, command="linear"):
        done = moco_tf(command, f"--workdir={tmp_path / 'bad'}", *SHORT, *arguments)
        assert done.returncode == code, done.stderr
        return last_line(done)

    assert "--encoder" in fails(2)
    assert "none of these" in fails(2, f"--encoder={tmp_path / 'nothing'}", "--config.data.name=embedded")
    unlabelled = photographs(tmp_path / "flat", labelled=False)
    assert "needs labels" in fails(3, f"--encoder={encoder}", "--config.data.name=folder",
                                      f"--config.data.path={unlabelled}")
    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    assert '"features"' in fails(2, f"--encoder={tmp_path / 'empty'}", "--config.data.name=embedded")
    shutil.copytree(encoder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["backbone"]["depth"] = 34
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert "step-40" in fails(3, f"--encoder={tmp_path / 'other'}")
    assert "--layers belongs to recipes" in fails(2, f"--encoder={encoder}", "--layers=3")
    assert "even" in fails(2, f"--encoder={encoder}", "--config=finetune_vit_base", "--config.batch_size=63",
                           command="finetune")
    assert "Leave it out" in fails(2, f"--encoder={encoder}", "--config.data.device_views=True")
    assert "matches none" in fails(2, "--encoder=random:moco_v3_vit_tiny_quickstart", "--config=finetune_vit_base",
                                   '--config.optimizer.exclude=("gama",)', command="finetune")


def test_a_label_outside_the_range_is_said(encoder, tmp_path):
    from moco_tf.data import tools
    data = photographs(tmp_path / "images")
    for split in ("train", "val"):
        tools.pack(str(data), str(tmp_path / "packed"), split)
    for facts in (tmp_path / "packed").glob("*.json"):
        facts.write_text(facts.read_text().replace('"class_names": ["0", "1"]', '"class_names": ["0"]'))
    done = moco_tf("linear", f"--encoder={encoder}", f"--workdir={tmp_path / 'run'}", *SHORT, "--config.batch_size=6",
                   "--config.data.name=records", f"--config.data.path={tmp_path / 'packed'}")
    assert done.returncode == 3, done.stderr
    assert "labels must be from 0 to 0" in last_line(done)
