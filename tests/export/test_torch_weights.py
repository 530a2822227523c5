"""The name table, checkpoints and layouts, without PyTorch; files and PyTorch's own networks: test_torch_files.py."""

import pickle
import sys

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.resnet import resnet
from moco_tf.backbones.vit import vit
from moco_tf.errors import DataError, UsageError
from moco_tf.export import torch_weights
from moco_tf.export.torch_files import read_state_dict
from moco_tf.export.torch_weights import Checkpoint
from moco_tf.heads import encoder, linear, mlp, predictor, projector
from moco_tf.methods.end_to_end import EndToEnd
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3

keras = tf.keras


def small_encoder(head=linear, dim=8, **arguments):
    backbone = resnet(**{**dict(depth=18, width=0.125, size=32), **arguments})
    return encoder(backbone, lambda features: head(features, dim=dim))


def small_method(queue_size=24, **arguments):
    method = MoCo(small_encoder(**arguments), dim=8, queue_size=queue_size, temperature=0.2, momentum=0.9)
    random = np.random.default_rng(0)
    for variable in method.encoder.weights + method.key_encoder.weights:    # no two alike, or a mix-up would not show
        variable.assign(random.uniform(0.5, 1.5, variable.shape))
    method.queue.pointer.assign(16)
    return method


def small_v3(family="vit", **arguments):
    """MoCo v3 on either family, its projector of two layers; no two weights alike."""
    if family == "vit":
        backbone = vit(**{**dict(dim=24, depth=2, heads=3, patch=8, size=16), **arguments})
    else:
        backbone = resnet(**{**dict(depth=18, width=0.125, size=32), **arguments})
    method = MoCoV3(encoder(backbone, lambda features: projector(features, hidden_dim=16, dim=8)),
                    predictor(dim=8, hidden_dim=16, last_bn=family == "vit"), temperature=0.2, momentum=0.99)
    random = np.random.default_rng(0)
    for variable in method.variables:
        if variable.shape.rank:
            variable.assign(random.uniform(0.5, 1.5, variable.shape))
    return method


def shapes_of(model):
    """The state dict of a model of a Graph, of zeros without memory, counters included."""
    state = {name: np.broadcast_to(0, shape) for name, shape in torch_weights.named_shapes(model).items()}
    counters = [name.replace("running_var", "num_batches_tracked") for name in state if name.endswith("running_var")]
    return {**state, **{name: np.array(0) for name in counters}}


def equal(ours, theirs):
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_names_and_shapes_are_pytorchs():
    state = torch_weights.state_dict(encoder(resnet(depth=18, size=32), mlp))
    shapes = {name: value.shape for name, value in state.items()}
    assert len(shapes) == 20 + 20 * 5 + 4
    some = {"conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,), "bn1.num_batches_tracked": (),
            "fc.0.weight": (512, 512), "fc.2.weight": (128, 512), "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer4.1.bn2.bias": (512,)}
    assert {name: shapes[name] for name in some} == some
    assert state["bn1.num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize("head, per_encoder", [(linear, 320), (mlp, 322)])
def test_the_official_layout_of_a_resnet50_has_as_many_names_as_the_released_files(head, per_encoder):
    method = MoCo(small_encoder(head, depth=50), dim=8, queue_size=24, temperature=0.2, momentum=0.9)
    names = torch_weights.official(torch_weights.checkpoint_of(method))
    assert len(names) == 2 * per_encoder + 2
    assert names["module.queue"].shape == (8, 24) and names["module.queue_ptr"].shape == (1,)


def test_kernels_are_transposed_by_meaning():
    """A convolution and a dense layer computed from PyTorch's weights by PyTorch's formulas."""
    images = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(5, (2, 3), use_bias=False, name="conv")(images)
    model = keras.Model(images, keras.layers.Dense(6, name="fc")(keras.layers.GlobalAveragePooling2D()(x)))
    random = np.random.default_rng(0)
    state = {"conv.weight": random.normal(size=(5, 3, 2, 3)), "fc.weight": random.normal(size=(6, 5)),
             "fc.bias": random.normal(size=6)}
    torch_weights.load_into(model, state)
    image = random.normal(size=(3, 4, 4))    # channels first
    conv = np.array([[[(kernel * image[:, i:i + 2, j:j + 3]).sum() for j in range(2)] for i in range(3)]
                     for kernel in state["conv.weight"]])
    expected = state["fc.weight"] @ conv.mean((1, 2)) + state["fc.bias"]
    output = model(image.transpose(1, 2, 0)[None].astype(np.float32))[0]
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_project_to_official_layout_and_back_is_bit_identical():
    source, target = small_method(), small_method()
    for variable in target.variables:
        variable.assign(tf.zeros_like(variable))
    state = torch_weights.official(torch_weights.checkpoint_of(source))
    torch_weights.restore(target, torch_weights.parse(state))
    for part in ("encoder", "key_encoder", "queue"):
        for ours, theirs in zip(getattr(target, part).variables, getattr(source, part).variables):
            np.testing.assert_array_equal(ours, theirs, err_msg=ours.name)
    equal(torch_weights.official(torch_weights.checkpoint_of(target)), state)


def test_a_file_without_momentum_encoder_and_queue_is_enough():
    source, target = small_method(), small_method()
    queue = target.queue.keys.numpy()
    checkpoint = torch_weights.checkpoint_of(source)._replace(key_encoder={}, queue=None)
    torch_weights.restore(target, torch_weights.parse(torch_weights.official(checkpoint)))
    for ours in (target.encoder, target.key_encoder):
        equal(torch_weights.state_dict(ours), torch_weights.state_dict(source.encoder))
    np.testing.assert_array_equal(target.queue.keys, queue)


@pytest.mark.parametrize("name, layers, per_encoder, in_predictor", [
    ("resnet", 2, 328, 7), ("vit_base", 3, 166, 10), ("vit_conv_small", 3, 178, 10)])
def test_the_official_layout_of_v3_has_the_names_of_its_files(name, layers, per_encoder, in_predictor):
    with tf.Graph().as_default():
        model = encoder(BACKBONES[name](), lambda features: projector(features, layers=layers))
        parts = shapes_of(model), shapes_of(predictor(last_bn=name != "resnet"))
    checkpoint = Checkpoint("pretraining", parts[0], parts[0], predictor=parts[1], heads=0 if name == "resnet" else 12)
    shapes = {name: value.shape for name, value in torch_weights.official(checkpoint).items()}
    assert len(shapes) == 2 * per_encoder + in_predictor
    some = {"predictor.0.weight": (4096, 256), "predictor.1.running_var": (4096,), "predictor.3.weight": (256, 4096)}
    if name == "resnet":
        some.update({"base_encoder.fc.0.weight": (4096, 2048), "momentum_encoder.fc.4.running_mean": (256,)})
    else:
        dim = shapes["module.base_encoder.cls_token"][-1]
        some.update({
            "predictor.4.num_batches_tracked": (), "base_encoder.head.0.weight": (4096, dim),
            "base_encoder.head.6.weight": (256, 4096), "momentum_encoder.head.7.running_var": (256,),
            "momentum_encoder.pos_embed": (1, 197, dim), "base_encoder.blocks.10.attn.qkv.weight": (3 * dim, dim),
            "base_encoder.blocks.0.mlp.fc1.bias": (4 * dim,), "base_encoder.norm.weight": (dim,)})
        some.update({"base_encoder.patch_embed.proj.9.weight": (dim, dim // 2, 3, 3),
                     "base_encoder.patch_embed.proj.12.bias": (dim,)} if "conv" in name else
                    {"base_encoder.patch_embed.proj.weight": (dim, 3, 16, 16)})
    assert {key: shapes[f"module.{key}"] for key in some} == some
    assert not any(key.endswith(("fc.4.weight", "head.7.weight", "predictor.4.weight")) for key in shapes)


@pytest.mark.parametrize("family, arguments", [
    ("vit", {}), ("vit", dict(stem="conv", patch=16)), ("vit", dict(freeze_patch=True)), ("resnet", {})])
def test_v3_to_official_layout_and_back_is_bit_identical(family, arguments):
    source, target = small_v3(family, **arguments), small_v3(family, **arguments)
    for variable in target.variables:
        variable.assign(tf.zeros_like(variable))
    state = torch_weights.official(torch_weights.checkpoint_of(source))
    torch_weights.restore(target, torch_weights.parse(state, heads=3 if family == "vit" else 0))
    for part in ("encoder", "key_encoder", "predictor"):
        for ours, theirs in zip(getattr(target, part).variables, getattr(source, part).variables):
            np.testing.assert_array_equal(ours, theirs, err_msg=ours.name)
    equal(torch_weights.official(torch_weights.checkpoint_of(target)), state)


def test_a_v3_file_without_momentum_encoder_and_predictor_is_enough():
    source, target = small_v3(), small_v3()
    before = target.predictor.get_weights()
    checkpoint = torch_weights.checkpoint_of(source)._replace(key_encoder={}, predictor=None)
    read = torch_weights.parse(torch_weights.official(checkpoint), heads=3)
    assert "MoCo v3" in torch_weights.describe(read) and "no predictor" in torch_weights.describe(read)
    torch_weights.restore(target, read)
    for ours in (target.encoder, target.key_encoder):
        equal(torch_weights.state_dict(ours), torch_weights.state_dict(source.encoder))
    for value, expected in zip(target.predictor.get_weights(), before):
        np.testing.assert_array_equal(value, expected)


def test_a_vision_transformer_with_a_queue_goes_through_the_layout_of_v1_and_v2():
    def method():
        return MoCo(encoder(vit(dim=24, depth=1, heads=3, patch=8, size=16), lambda x: linear(x, dim=8)), dim=8,
                    queue_size=24, temperature=0.2, momentum=0.9)

    source, target = method(), method()
    state = torch_weights.official(torch_weights.checkpoint_of(source))
    assert "module.encoder_q.head.weight" in state and "module.queue" in state
    torch_weights.restore(target, torch_weights.parse(state, heads=3))
    for ours, theirs in zip(target.encoder.variables, source.encoder.variables):
        np.testing.assert_array_equal(ours, theirs)


def test_files_of_one_version_are_not_for_the_other():
    v2, v3 = small_method(head=mlp), small_v3("resnet")
    with pytest.raises(DataError, match="queue.*method's, none"):
        torch_weights.restore(v3, torch_weights.checkpoint_of(v2))
    with pytest.raises(DataError, match="predictor.*MoCo v3.*for a MoCo"):
        torch_weights.restore(v2, torch_weights.checkpoint_of(v3))


def transformer(dim, prefix="", **others):
    """Of a state dict what tells its kind."""
    return {f"{prefix}cls_token": np.zeros((1, 1, dim)), **others}


@pytest.mark.parametrize("state, heads, expected", [
    (transformer(384, "module.base_encoder."), 0, 12), (transformer(768, "module.base_encoder."), 0, 12),
    (transformer(384, "module."), 0, 12),    # MoCo v3's linear probe
    (transformer(768), 0, 12), (transformer(384), 6, 6), (transformer(192), 3, 3)])
def test_attention_heads_are_those_of_the_papers_or_as_told(state, heads, expected):
    assert torch_weights.parse(state, heads).heads == expected


@pytest.mark.parametrize("state, message", [
    (transformer(384), "width 384, MoCo v3's has 12, DeiT-S 6.*--heads"),
    (transformer(192, "module.base_encoder."), "width 192.*--heads"), (transformer(192), "DeiT-Ti has 3")])
def test_attention_heads_are_not_guessed(state, message):
    with pytest.raises(DataError, match=message) as caught:
        torch_weights.parse(state)
    assert "\n" not in str(caught.value)


def test_wrong_numbers_of_heads_are_refused():
    checkpoint = torch_weights.checkpoint_of(small_v3())
    with pytest.raises(DataError, match="width 24, 5 heads"):
        torch_weights.describe(checkpoint._replace(heads=5))
    with pytest.raises(DataError, match="a model with 3, a file with 4"):
        torch_weights.restore(small_v3(), checkpoint._replace(heads=4))
    with pytest.raises(DataError, match="a model with 3, a file with 4"):
        torch_weights.load_backbone(small_v3().encoder, checkpoint._replace(heads=4))
    with pytest.raises(DataError, match="heads=12, for another"):
        torch_weights.parse({"conv1.weight": np.zeros((64, 3, 7, 7))}, heads=12)


def test_the_deit_layout_is_the_backbone_of_a_vision_transformer_with_the_classifier_where_there_is_one():
    checkpoint = torch_weights.checkpoint_of(small_v3())
    state = torch_weights.deit(checkpoint)
    assert not any(name.startswith(("head.", "fc.")) for name in state)
    backbone = vit(dim=24, depth=2, heads=3, patch=8, size=16)
    torch_weights.load_backbone(backbone, torch_weights.parse(state, heads=3))
    equal(torch_weights.state_dict(backbone), state)
    probed = {**{f"module.{name}": value for name, value in state.items()},
              "module.head.weight": np.zeros((10, 24)), "module.head.bias": np.zeros(10)}
    probe = torch_weights.parse(probed, heads=3)
    assert probe.kind == "probe" and torch_weights.deit(probe)["head.weight"].shape == (10, 24)
    equal(torch_weights.official(probe), probed)


@pytest.mark.parametrize("family, layout, message", [
    ("vit", "torchvision", "Use official or deit"), ("vit", "detectron2", "Use official or deit"),
    ("resnet", "deit", "Use official or torchvision or detectron2")])
def test_layouts_of_another_family_are_refused(tmp_path, family, layout, message):
    path = str(tmp_path / ("w.pkl" if layout == "detectron2" else "w.pth"))
    with pytest.raises(UsageError, match=f"{layout} does not go.*MoCo v3.*{message}"):
        torch_weights.write(path, torch_weights.checkpoint_of(small_v3(family)), layout)


def test_the_official_layout_is_not_for_a_bare_backbone(tmp_path):
    checkpoint = torch_weights.parse(torch_weights.state_dict(resnet(depth=18, width=0.125, size=32)))
    with pytest.raises(UsageError, match="without a head.*Use torchvision or detectron2"):
        torch_weights.write(str(tmp_path / "w.pth"), checkpoint, "official")


@pytest.mark.parametrize("spoil, message", [
    (lambda c: c.encoder.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias"),
    (lambda c: c.predictor.pop("predictor.1.bias"), "predictor.1.bias"),
    (lambda c: c.key_encoder.pop("pos_embed"), "pos_embed")])
def test_what_is_missing_in_a_v3_file_is_found(spoil, message):
    checkpoint = torch_weights.checkpoint_of(small_v3())
    assert torch_weights.fit(checkpoint).complete
    spoil(checkpoint)
    assert torch_weights.fit(checkpoint).missing == [message]


def test_a_broken_vision_transformer_has_no_architecture():
    with pytest.raises(DataError, match="class token and position embedding"):
        torch_weights.architecture(Checkpoint("backbone", {"cls_token": np.zeros((1, 1, 768))}, {}, heads=12))


def test_v3_counts_two_batches_a_step():
    method = small_v3()
    method.compile(optimizer="sgd")
    method.optimizer.iterations.assign(7)
    state = torch_weights.official(torch_weights.checkpoint_of(method))
    for name in ("predictor.1", "base_encoder.head.1", "momentum_encoder.head.4"):
        assert state[f"module.{name}.num_batches_tracked"] == 14


def test_the_counter_of_batches_is_the_step():
    method = small_method()
    method.compile(optimizer="sgd")
    method.optimizer.iterations.assign(7)
    state = torch_weights.official(torch_weights.checkpoint_of(method))
    assert state["module.encoder_k.layer1.0.bn2.num_batches_tracked"] == 7


@pytest.mark.parametrize("arguments, message", [
    (dict(width=0.25), r"of another shape: conv1.weight \(8, 3, 7, 7\), not \(16, 3, 7, 7\)"),
    (dict(depth=34), r"missing: layer1.2.conv1.weight"),
    (dict(head=mlp), r"missing: fc.0.weight.*unexpected: fc.weight")])
def test_another_architecture_is_refused_and_nothing_changes(arguments, message):
    checkpoint = torch_weights.checkpoint_of(small_method())
    target = small_method(**arguments)
    before = [variable.numpy() for variable in target.variables]
    with pytest.raises(DataError, match=message):
        torch_weights.restore(target, checkpoint)
    for variable, value in zip(target.variables, before):
        np.testing.assert_array_equal(variable, value)


def test_a_broken_key_encoder_leaves_the_encoder_as_it_was():
    target = small_method()
    checkpoint = torch_weights.checkpoint_of(small_method())
    del checkpoint.key_encoder["fc.bias"]
    target.encoder.get_layer("fc").bias.assign(np.full(8, 5.0))
    with pytest.raises(DataError, match="1 missing: fc.bias"):
        torch_weights.restore(target, checkpoint)
    np.testing.assert_array_equal(target.encoder.get_layer("fc").bias, np.full(8, 5.0))


def test_another_queue_is_refused():
    with pytest.raises(DataError, match=r"\(32, 8\). Received: \(24, 8\)"):
        torch_weights.restore(small_method(queue_size=32), torch_weights.checkpoint_of(small_method()))


def test_a_report_says_what_became_of_every_name():
    model = small_encoder()
    state = torch_weights.state_dict(model)
    state["extra.weight"], state["fc.weight"] = np.zeros(3), np.zeros((4, 4))
    del state["bn1.bias"]
    report = torch_weights.load_into(model, state, strict=False)
    assert (report.missing, report.unexpected) == (["bn1.bias"], ["extra.weight"])
    assert report.misshapen == [("fc.weight", (8, 64), (4, 4))]
    assert len(report.matched) == len(model.weights) - 2
    table = report.table().splitlines()
    assert len(table) == len(model.weights) + 1
    assert [line.split()[0] for line in table[-3:]] == ["missing", "unexpected", "wrong"]
    assert "fc.weight: model (8, 64), file (4, 4)" in table[-1]


def test_what_is_not_strict_assigns_what_fits():
    model = small_encoder()
    torch_weights.load_into(model, {"bn1.weight": np.full(8, 3.0)}, strict=False)
    np.testing.assert_array_equal(model.get_layer("bn1").gamma, np.full(8, 3.0))


def probe(prefix="module."):
    model = small_encoder(dim=10)
    return torch_weights.parse({prefix + name: value for name, value in torch_weights.state_dict(model).items()})


def test_kinds_are_told_apart():
    method = small_method()
    backbone = keras.Model(method.encoder.input, method.encoder.get_layer("features").output)
    assert torch_weights.parse(torch_weights.official(torch_weights.checkpoint_of(method))).kind == "pretraining"
    assert torch_weights.parse(torch_weights.state_dict(backbone)).kind == "backbone"
    assert probe("module.").kind == probe("").kind == "probe"


def test_a_probe_is_refused_unless_allowed():
    method = small_method()
    backbone = resnet(depth=18, width=0.125, size=32)
    with pytest.raises(DataError, match="classifier.*backbone only"):
        torch_weights.restore(method, probe())
    with pytest.raises(DataError, match="classifier.*allow a probe"):
        torch_weights.load_backbone(backbone, probe())
    torch_weights.load_backbone(backbone, probe(), allow_probe=True)


def test_starting_from_a_backbone_leaves_heads_and_queue():
    method, checkpoint = small_method(), probe()
    head, queue = method.encoder.get_layer("fc").get_weights(), method.queue.keys.numpy()
    torch_weights.restore(method, checkpoint, backbone_only=True)
    for model in (method.encoder, method.key_encoder):
        np.testing.assert_array_equal(model.get_layer("conv1").kernel.numpy().transpose(3, 2, 0, 1),
                                      checkpoint.encoder["conv1.weight"])
    np.testing.assert_array_equal(method.encoder.get_layer("fc").get_weights()[0], head[0])
    np.testing.assert_array_equal(method.queue.keys, queue)


@pytest.mark.parametrize("names, message", [
    (["encoder.module.a.weight"], "1 names such as encoder"), (["a", "b"], "2 names such as a, b")])
def test_other_models_are_named(names, message):
    with pytest.raises(DataError, match=message):
        torch_weights.parse({name: np.zeros(1) for name in names})


@pytest.mark.parametrize("arguments", [
    dict(depth=18, width=0.25), dict(depth=34, width=2), dict(depth=50), dict(depth=101, width=0.5),
    dict(depth=50, groups=32, width_per_group=4), dict(depth=50, groups=32, width_per_group=8), dict(depth=50, width=2),
    dict(depth=50, width_per_group=128), dict(depth=18, stem="cifar", channels=1),
    dict(depth=50, width=2, stem_channels=64), dict(depth=18, width=0.5, stem_channels=64, channels=2)])
def test_the_architecture_is_read_off_the_shapes(arguments):
    with tf.Graph().as_default():
        shapes = torch_weights.named_shapes(resnet(**arguments))
    state = {name: np.broadcast_to(0, shape) for name, shape in shapes.items()}
    full = dict(width=1, groups=1, width_per_group=64, stem="imagenet", channels=3)
    assert torch_weights.architecture(Checkpoint("backbone", state, {})) == {
        "branches": (), "backbone": {"name": "resnet", **full, **arguments}, "head": None, "predictor": None}


@pytest.mark.parametrize("name, size", [
    ("vit_small", dict(size=96)), ("vit_conv_base", dict(channels=1)),
    ("vit", dict(dim=24, depth=3, heads=12, patch=4, size=32, mlp_ratio=2))])
def test_the_architecture_of_a_vision_transformer_is_read_off_the_shapes(name, size):
    with tf.Graph().as_default():
        model = BACKBONES[name](**size)
        state = shapes_of(model)
        read = torch_weights.architecture(Checkpoint("backbone", state, {}, heads=12))
        again = torch_weights.backbone_model(read)
        assert torch_weights.named_shapes(again) == torch_weights.named_shapes(model)
    assert [layer.heads for layer in again.layers if hasattr(layer, "heads")] == [12] * read["backbone"]["depth"]
    assert again.input_shape == model.input_shape


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_projector_and_predictor_are_read_off_the_shapes(family):
    built = torch_weights.architecture(torch_weights.checkpoint_of(small_v3(family)))
    assert built["head"] == dict(name="projector", layers=2, hidden_dim=16, dim=8)
    assert built["predictor"] == dict(layers=2, hidden_dim=16, dim=8, last_bn=family == "vit")


def test_the_head_is_read_off_the_shapes():
    def deep(features, dim):
        return mlp(features, dim, hidden_dim=(32, 32, 16, 16, 16, 16))    # fc.10 and fc.12 must come after fc.2

    states = [torch_weights.state_dict(small_encoder(head)) for head in (linear, mlp, deep)]
    heads = [torch_weights.architecture(Checkpoint("pretraining", state, {}))["head"] for state in states]
    assert heads == [dict(name="linear", dim=8), dict(name="mlp", dim=8, hidden_dim=64),
                     dict(name="mlp", dim=8, hidden_dim=(32, 32, 16, 16, 16, 16))]




def test_a_checkpoint_fits_the_model_that_it_is_of():
    for checkpoint in (torch_weights.checkpoint_of(small_method(head=mlp)), probe()):
        report = torch_weights.fit(checkpoint)
        assert report.complete and set(report.matched) == {name for name in checkpoint.encoder if "num_b" not in name}
    del checkpoint.encoder["bn1.weight"]
    assert torch_weights.fit(checkpoint).missing == ["bn1.weight"]


def test_a_description_names_kind_encoder_and_queue():
    sentence = torch_weights.describe(torch_weights.checkpoint_of(small_method()))
    for part in ("pre-training", "depth=18", "width=0.125", "linear(dim=8)", "momentum encoder", "24 keys"):
        assert part in sentence


@pytest.mark.parametrize("shared", [False, True])
def test_a_run_whose_encoders_both_learn_is_called_no_moco(shared):
    sentence = torch_weights.describe(torch_weights.checkpoint_of(
        EndToEnd(small_encoder(), dim=8, temperature=0.2, shared=shared)))
    assert "checkpoint of the end-to-end mechanism" in sentence and "learns too, no queue" in sentence
    assert "MoCo" not in sentence and "momentum" not in sentence


def test_no_resnet_has_no_architecture():
    with pytest.raises(DataError, match="ResNet-18, 34, 50"):
        torch_weights.architecture(Checkpoint("backbone", {"conv1.weight": np.zeros((64, 3, 11, 11))}, {}))


def test_detectron2_names_and_file(tmp_path):
    checkpoint = torch_weights.checkpoint_of(small_method(depth=50))
    path = str(tmp_path / "weights.pkl")
    torch_weights.write(path, checkpoint, "detectron2")
    with open(path, "rb") as file:
        content = pickle.load(file)
    assert (content["__author__"], content["matching_heuristics"]) == ("MOCO", True)
    model = content["model"]
    for theirs, ours in {
            "stem.conv1.weight": "conv1.weight", "stem.conv1.norm.running_var": "bn1.running_var",
            "res4.0.shortcut.norm.bias": "layer3.0.downsample.1.bias",
            "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
            "res5.2.conv3.norm.num_batches_tracked": "layer4.2.bn3.num_batches_tracked",
            "stem.fc.weight": "fc.weight"}.items():
        np.testing.assert_array_equal(model[theirs], checkpoint.encoder[ours])
    assert len(model) == len(checkpoint.encoder)


def test_torchvisions_layout_has_a_classifier_only_where_there_is_one():
    pretraining = torch_weights.torchvision(torch_weights.checkpoint_of(small_method()))
    assert not any(name.startswith("fc.") for name in pretraining)
    assert torch_weights.torchvision(probe())["fc.weight"].shape == (10, 64)


@pytest.mark.parametrize("path, layout, message", [
    ("w.pth", "keras", "official, cmc, torchvision, deit, detectron2"), ("w.pkl", "torchvision", r"must end in \.pth"),
    ("w.pth", "detectron2", r"must end in \.pkl")])
def test_wrong_layouts_and_suffixes_are_refused(tmp_path, path, layout, message):
    with pytest.raises(UsageError, match=message):
        torch_weights.write(str(tmp_path / path), Checkpoint("backbone", {}, {}), layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["missing/w.pkl", "taken.pkl"])
def test_a_target_that_cannot_be_written_leaves_nothing(tmp_path, path):
    checkpoint = torch_weights.checkpoint_of(small_method())
    (tmp_path / "taken.pkl").mkdir()
    with pytest.raises(DataError, match="writable"):
        torch_weights.write(str(tmp_path / path), checkpoint, "detectron2")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.pkl"]


@pytest.mark.parametrize("name, package", [("w.pth", "torch"), ("w.safetensors", "safetensors")])
def test_a_missing_package_is_named_with_the_way_to_install_it(tmp_path, monkeypatch, name, package):
    path = tmp_path / name
    path.write_bytes(b"x")
    for module in ("torch", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install moco_tf\[torch\]"):
        read_state_dict(str(path))


def test_files_of_other_kinds_and_missing_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"\.pth, \.pth\.tar"):
        read_state_dict(str(tmp_path / "weights.pkl"))
    with pytest.raises(DataError, match="must exist"):
        read_state_dict(str(tmp_path / "weights.pth"))
