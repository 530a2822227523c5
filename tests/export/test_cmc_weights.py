"""Checkpoints of CMC and InsDis in the names of CMC's code, without PyTorch; files and networks: test_cmc_files.py."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.errors import DataError, UsageError
from moco_tf.export import torch_weights
from moco_tf.export.torch_weights import Checkpoint
from moco_tf.heads import encoder, linear, mlp
from moco_tf.methods import CMC, InsDis, MoCo

BRANCHES = (("l_to_ab", 1), ("ab_to_l", 2))
SMALL = dict(name="resnet", depth=18, width=0.125, stem_channels=64)


def branched(branches=BRANCHES, head=linear, dim=8, size=32, name="resnet", **arguments):
    build = functools.partial(BACKBONES[name], size=size, **arguments)
    return encoder(branched_backbone(branches, lambda channels: build(channels=channels), size),
                   lambda features: branched_head(branches, functools.partial(head, dim=dim), features))


def single(head=linear, **arguments):
    arguments = {**SMALL, "size": 32, **arguments}
    return encoder(BACKBONES[arguments.pop("name")](**arguments), lambda features: head(features, dim=8))


def spread(method):
    """Gives all variables values of their own; returns the method."""
    random = np.random.default_rng(0)
    for variable in method.variables:    # no two alike, or a mix-up would not show
        if variable.shape.rank:
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return method


def cmc(loss="nce", size=50, **arguments):
    method = spread(CMC(branched(**{**SMALL, **arguments}), dim=8, bank_size=size, temperature=0.07, num_negatives=16,
                        loss=loss, momentum=0.5))
    for criterion, value in zip(method.criteria, (120.25, 340.5)):
        if loss == "nce":
            criterion.partition.assign(value)
    return method


def insdis(size=50, **arguments):
    method = spread(InsDis(single(**arguments), dim=8, bank_size=size, temperature=0.1, num_negatives=16, loss="nce"))
    method.criteria[0].partition.assign(75.5)
    return method


def zeroed(method):
    for variable in method.variables:
        if variable.dtype.is_floating:
            variable.assign(tf.zeros_like(variable))
    return method


def saved(method):
    """{name: value} of what training remembers."""
    values = {**torch_weights.state_dict(method.encoder)}
    values.update({f"bank {i}": bank.rows.numpy() for i, bank in enumerate(method.banks)})
    values.update({f"Z {i}": criterion.partition.numpy() for i, criterion in enumerate(method.criteria)
                   if hasattr(criterion, "partition")})
    return values


def equal(ours, theirs):
    assert set(ours) == set(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("backbone, dim, total, head", [
    (dict(name="alexnet", size=224), 128, 29_687_760, "fc8.0.weight"),
    (dict(name="resnet", depth=50, width=0.5, stem_channels=64), 128, 12_058_048, "fc.weight")])
def test_the_names_and_numbers_of_parameters_are_those_of_the_code(backbone, dim, total, head):
    with tf.Graph().as_default():
        shapes = torch_weights.named_shapes(branched(dim=dim, **backbone))
    state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    written = torch_weights.cmc(Checkpoint("pretraining", state, {}))
    learnt = [value.size for name, value in written.items() if "running" not in name]
    assert sum(learnt) == total
    for branch, channels in BRANCHES:
        assert written[f"encoder.module.{branch}.{head}"].shape[0] == 128
        first = "conv_block_1.0.weight" if "alexnet" in backbone["name"] else "conv1.weight"
        assert written[f"encoder.module.{branch}.{first}"].shape[1] == channels
    assert set(torch_weights.parse(written).encoder) == set(state)


@pytest.mark.parametrize("loss", ["nce", "softmax"])
def test_cmc_to_its_code_s_layout_and_back_is_bit_identical(loss):
    source = cmc(loss)
    state = torch_weights.cmc(torch_weights.checkpoint_of(source, "Lab"))
    expected = [120.25, 340.5] if loss == "nce" else [-1, -1]
    np.testing.assert_array_equal(state["contrast.params"], np.float32([16, 0.07, *expected, 0.5]))
    assert state["contrast.params"].dtype == np.float32
    np.testing.assert_array_equal(state["contrast.memory_ab"], source.banks[1].rows)
    read = torch_weights.parse(state)
    assert (read.method, read.kind, read.banks.temperature) == ("CMC", "pretraining", 0.07)
    target = zeroed(cmc(loss))
    torch_weights.restore(target, read)
    equal(saved(target), saved(source))
    equal(torch_weights.cmc(torch_weights.checkpoint_of(target)), state)


def test_insdis_to_its_code_s_layout_and_back_is_bit_identical():
    source, target = insdis(), zeroed(insdis())
    state = torch_weights.cmc(torch_weights.checkpoint_of(source))
    assert "encoder.module.fc.weight" in state and "contrast.memory" in state
    np.testing.assert_array_equal(state["contrast.params"], np.float32([16, 0.1, 75.5, 0.5]))
    read = torch_weights.parse(state)
    assert read.method == "InsDis"
    torch_weights.restore(target, read)
    equal(saved(target), saved(source))


def test_moco_goes_through_the_layout_with_its_oldest_key_first():
    def method():
        return spread(MoCo(single(), dim=8, queue_size=10, temperature=0.1, momentum=0.9))

    source, target = method(), zeroed(method())
    source.queue.pointer.assign(4)
    state = torch_weights.cmc(torch_weights.checkpoint_of(source))
    assert state["contrast.params"].tolist() == [-1] and state["contrast.params"].dtype == np.int64
    np.testing.assert_array_equal(state["contrast.memory"][0], source.queue.keys[4])
    torch_weights.restore(target, torch_weights.parse(state))
    np.testing.assert_array_equal(target.queue.keys[6], source.queue.keys[0])
    assert int(target.queue.pointer) == 0
    equal(torch_weights.state_dict(target.key_encoder), torch_weights.state_dict(source.key_encoder))


@pytest.mark.parametrize("prefix", ["", "module.", "encoder.", "encoder.module.", "module.encoder.module."])
def test_encoders_are_found_wrapped_and_not_and_in_their_order(prefix):
    state = torch_weights.state_dict(branched(**SMALL))
    shuffled = sorted(state)    # as safetensors leaves them: ab_to_l comes first
    read = torch_weights.parse({prefix + name: state[name] for name in shuffled})
    assert list(read.branches) == ["l_to_ab", "ab_to_l"] and read.banks.rows == ()
    target = branched(**SMALL)
    torch_weights.load_into(target, read.encoder)
    equal(torch_weights.state_dict(target), state)
    assert "no memory bank" in torch_weights.describe(read)


@pytest.mark.parametrize("arguments", [
    dict(depth=18, width=0.5, stem_channels=64), dict(name="alexnet", size=64), dict(name="alexnet", size=224)])
def test_the_architecture_is_read_off_the_shapes(arguments):
    with tf.Graph().as_default():
        model = branched(**{"size": 224, **arguments})
        state = {name: np.broadcast_to(0, shape) for name, shape in torch_weights.named_shapes(model).items()}
        checkpoint = Checkpoint("pretraining", state, {})
        built = torch_weights.architecture(checkpoint)
        assert torch_weights.fit(checkpoint).complete
    full = dict(name="resnet", groups=1, width_per_group=64, stem="imagenet") if "depth" in arguments else {}
    assert built == {"branches": BRANCHES, "backbone": {**full, **arguments}, "head": dict(name="linear", dim=8),
                     "predictor": None}


def test_a_description_says_what_is_in_it():
    told = torch_weights.describe(torch_weights.checkpoint_of(cmc(), "YCbCr"))
    for part in ("pre-training checkpoint of CMC", "l_to_ab (1 channel) and ab_to_l (2 channels) of YCbCr", "depth=18",
                 "linear(dim=8)", "2 memory banks of 50 rows", "K 16", "T 0.07", "Z 120.25 and 340.5"):
        assert part in told
    assert "Z unset and unset" in torch_weights.describe(torch_weights.checkpoint_of(cmc("softmax")))
    assert "taken for Lab" in torch_weights.describe(torch_weights.checkpoint_of(cmc()))
    assert "checkpoint of InsDis" in torch_weights.describe(torch_weights.checkpoint_of(insdis()))


def test_other_banks_are_refused_and_nothing_changes():
    target = cmc(size=49)
    before = saved(target)
    with pytest.raises(DataError, match=r"\(49, 8\).*Received.*\(50, 8\)"):
        torch_weights.restore(target, torch_weights.checkpoint_of(cmc())._replace(encoder={}))
    with pytest.raises(DataError, match="none.*Received"):
        torch_weights.restore(MoCo(single(), dim=8, queue_size=10, temperature=0.1, momentum=0.9),
                              torch_weights.checkpoint_of(insdis()))
    equal(saved(target), before)


def test_what_is_missing_in_one_branch_is_found():
    checkpoint = torch_weights.checkpoint_of(cmc())
    del checkpoint.encoder["ab_to_l.layer3.1.bn2.weight"]
    assert torch_weights.fit(checkpoint).missing == ["ab_to_l.layer3.1.bn2.weight"]
    del checkpoint.encoder["ab_to_l.fc.weight"]
    with pytest.raises(DataError, match="alike but for their channels"):
        torch_weights.fit(checkpoint)


@pytest.mark.parametrize("contrast, told", [
    ({"params": np.zeros(4)}, "params, with 4"), ({"memory_l": np.zeros((5, 8))}, "memory_l, with 0"),
    ({"memory": np.zeros((5, 8)), "params": np.zeros(5)}, "with 5")])
def test_a_memory_that_is_not_whole_is_refused(contrast, told):
    state = {f"encoder.module.{name}": value for name, value in torch_weights.state_dict(single()).items()}
    with pytest.raises(DataError, match=told):
        torch_weights.parse({**state, **{f"contrast.{name}": value for name, value in contrast.items()}})


@pytest.mark.parametrize("layout", ["official", "torchvision", "deit", "detectron2"])
def test_other_layouts_are_refused_for_cmc(tmp_path, layout):
    path = str(tmp_path / ("w.pkl" if layout == "detectron2" else "w.pth"))
    with pytest.raises(UsageError, match=f"{layout} does not go.*checkpoint of CMC.*Use cmc.$"):
        torch_weights.write(path, torch_weights.checkpoint_of(cmc()), layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [dict(branches=(("rgb", 3), ("depth", 1))), dict(head=mlp)])
def test_branches_and_heads_that_the_code_has_not_are_refused(tmp_path, arguments):
    checkpoint = torch_weights.checkpoint_of(cmc(**arguments))
    with pytest.raises(UsageError, match="None does: of branches, l_to_ab and ab_to_l alone, with linear heads"):
        torch_weights.write(str(tmp_path / "w.pth"), checkpoint, "cmc")


def test_the_layout_is_one_of_pytorch_s_files(tmp_path):
    with pytest.raises(UsageError, match=r"must end in \.pth or"):
        torch_weights.write(str(tmp_path / "w.safetensors"), torch_weights.checkpoint_of(cmc()), "cmc")


def test_queues_of_branches_stay_and_their_encoders_go():
    method = spread(MoCo(branched(**SMALL), dim=8, queue_size=10, temperature=0.1, momentum=0.9))
    read = torch_weights.parse(torch_weights.cmc(torch_weights.checkpoint_of(method)))
    equal(read.encoder, torch_weights.state_dict(method.encoder))
    equal(read.key_encoder, torch_weights.state_dict(method.key_encoder))
    assert read.queue is None and read.banks.rows == ()
