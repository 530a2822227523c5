"""The quick starts learn, and what they learn helps: whole runs of the README's commands, minutes each."""

import json

import pytest

from conftest import moco_tf

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
QUICKSTARTS = ("quickstart", "moco_v3_r18_quickstart", "moco_v3_vit_tiny_quickstart")


def results_of(command, workdir, *arguments):
    done = moco_tf(command, f"--workdir={workdir}", "--config.log.tensorboard=false", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "results.json").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(recipe, seed) -> (workdir, results) of that run, which is made once."""
    runs = {}

    def run(recipe, seed):
        if (recipe, seed) not in runs:
            workdir = tmp_path_factory.mktemp(recipe) / str(seed)
            runs[recipe, seed] = workdir, results_of("pretrain", workdir, f"--config={recipe}", f"--config.seed={seed}")
        return runs[recipe, seed]

    return run


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", QUICKSTARTS)
def test_a_quick_start_learns(trained, recipe, seed):
    _, results = trained(recipe, seed)
    assert results["view_retrieval_final"] >= results["view_retrieval_initial"] + 0.3
    assert results["knn_top1_final"] > results["knn_top1_initial"]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", QUICKSTARTS)
def test_fine_tuning_from_a_quick_start_beats_random_weights(trained, recipe, seed, tmp_path):
    start = ["--config=finetune_quickstart", f"--config.seed={seed}"]
    ours = results_of("finetune", tmp_path / "trained", f"--encoder={trained(recipe, seed)[0]}", *start)
    random = results_of("finetune", tmp_path / "random", f"--encoder=random:{recipe}", *start)
    assert ours["top1"] > random["top1"]


def test_the_two_linear_probes_agree_and_beat_random_weights(trained, tmp_path):
    workdir, results = trained("quickstart", 0)

    def probes(encoder, name):
        common = [f"--encoder={encoder}", "--config=linear_quickstart"]
        protocol = results_of("linear", tmp_path / name, *common)
        assert protocol["backbone_unchanged"]
        fast = results_of("linear", tmp_path / f"{name}_fast", *common, "--fast")
        return protocol["top1"], fast["top1"]

    ours, random = probes(workdir, "ours"), probes("random:quickstart", "random")
    assert abs(ours[0] - ours[1]) <= 0.01
    assert min(ours) > max(random)


def test_knn_agrees_with_the_monitor(trained, tmp_path):
    workdir, results = trained("quickstart", 0)
    done = moco_tf("knn", f"--encoder={workdir}", f"--workdir={tmp_path}", "--k=20", "--temperature=0.1")
    assert done.returncode == 0, done.stderr
    top1 = json.loads((tmp_path / "knn.json").read_text())["grid"][0]["top1"]
    assert abs(top1 - results["knn_top1_final"]) <= 0.002
