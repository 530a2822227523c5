"""ResNets: published parameter counts, names, padding and initial values. Their outputs: tests/golden."""

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.backbones import BACKBONES
from moco_tf.backbones.resnet import numbered_layers, resnet
from moco_tf.errors import UsageError
from moco_tf.heads import encoder, linear, mlp

keras = tf.keras
SMALL = dict(depth=18, width=0.125, size=32)


def count(variables):
    return sum(variable.shape.num_elements() for variable in variables)


# Parameters of the backbone, with v1's head and with v2's, counted in the PyTorch models; None: not published.
COUNTS = {
    "resnet18": (dict(depth=18), 11176512, 11242176, 11504832),
    "resnet34": (dict(depth=34), 21284672, 21350336, 21612992),
    "resnet50": (dict(depth=50), 23508032, 23770304, 27966656),
    "resnet101": (dict(depth=101), 42500160, 42762432, 46958784),
    "resnet152": (dict(depth=152), 58143808, 58406080, 62602432),
    "resnext50_32x4d": (dict(depth=50, groups=32, width_per_group=4), 22979904, 23242176, 27438528),
    "resnext50_32x8d": (dict(depth=50, groups=32, width_per_group=8), 45972800, 46235072, 50431424),
    "resnet50_w2": (dict(depth=50, width=2), 93907072, 94431488, None),
    "resnet50_w4": (dict(depth=50, width=4), 375378176, 376426880, None),
    "wide_resnet50_2": (dict(depth=50, width_per_group=128), 66834240, 67096512, 71292864),
    "resnet18_cifar": (dict(depth=18, stem="cifar"), 11168832, 11234496, None),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name):
    arguments, backbone_count, v1_count, v2_count = COUNTS[name]
    with tf.Graph().as_default():    # variables without memory: w4 alone would take 1.5 GB
        backbone = BACKBONES["resnet"](**arguments)
        assert count(backbone.trainable_variables) == backbone_count
        assert count(encoder(backbone, linear).trainable_variables) == v1_count
        assert v2_count in (None, count(encoder(backbone, mlp).trainable_variables))


@pytest.mark.parametrize("depth, floats, layers", [(18, 9600, 20), (50, 53120, 53), (101, 105344, 104)])
def test_running_statistics_counts(depth, floats, layers):
    with tf.Graph().as_default():
        statistics = resnet(depth).non_trainable_variables
    assert (count(statistics), len(statistics)) == (floats, 2 * layers)


def test_layers_with_weights_have_the_names_of_torchvisions_modules():
    with tf.Graph().as_default():
        names = {layer.name for layer in resnet(depth=50).layers if layer.weights}
    blocks = {f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)}
    inner = {f"{block}.{kind}{i}" for block in blocks for kind in ("conv", "bn") for i in (1, 2, 3)}
    shortcuts = {f"layer{stage}.0.downsample.{i}" for stage in (1, 2, 3, 4) for i in (0, 1)}
    assert names == {"conv1", "bn1"} | inner | shortcuts


def test_the_first_stage_of_basic_blocks_has_no_downsampling():
    names = {layer.name for layer in resnet(**SMALL).layers}
    assert "layer1.0.downsample.0" not in names and "layer2.0.downsample.0" in names


@pytest.mark.parametrize("arguments, shape", [
    (SMALL, (None, 64)), (dict(SMALL, width=0.25), (None, 128)), (dict(SMALL, size=None), (None, 64)),
    (dict(depth=50, width=0.125, size=32), (None, 256)), (dict(SMALL, channels=1), (None, 64))])
def test_output_shapes(arguments, shape):
    assert resnet(**arguments).output_shape == shape


def test_any_size_of_image_fits_a_model_without_one():
    model = resnet(**dict(SMALL, size=None))
    assert [model(np.zeros((2, side, side, 3), np.float32)).shape for side in (32, 41)] == [(2, 64), (2, 64)]


def test_strided_layers_pad_both_sides_alike():
    """An impulse through the stem: PyTorch's output row i sees rows 2i - 3 .. 2i + 3, not SAME's 2i - 2 .. 2i + 4."""
    model = resnet(**SMALL)
    stem = keras.Model(model.input, model.get_layer("conv1").output)
    image = np.zeros((1, 32, 32, 3), np.float32)
    image[0, 7, 7, 0] = 1
    kernel = model.get_layer("conv1").kernel.numpy()
    output = stem(image).numpy()
    assert output.shape == (1, 16, 16, 8)
    for row in range(16):
        tap = 7 - (2 * row - 3)
        expected = kernel[tap, tap, 0] if 0 <= tap < 7 else np.zeros(8)
        np.testing.assert_allclose(output[0, row, row], expected, atol=1e-7)


def test_the_pool_of_the_stem_pads_both_sides_alike():
    model = resnet(**SMALL)
    pool = keras.Model(model.get_layer("relu").output, model.get_layer("maxpool").output)
    x = np.random.default_rng(0).uniform(size=(1, 16, 16, 8)).astype(np.float32)
    padded = np.full((18, 18, 8), -np.inf)
    padded[1:-1, 1:-1] = x[0]
    expected = [[padded[r:r + 3, c:c + 3].max((0, 1)) for c in range(0, 16, 2)] for r in range(0, 16, 2)]
    np.testing.assert_allclose(pool(x)[0], expected)


def test_convolutions_start_normal_by_their_outputs_and_untruncated():
    for groups in (1, 32):
        model = resnet(depth=50, width=0.5, groups=groups, size=32)
        kernel = model.get_layer("layer4.1.conv2").kernel.numpy()
        deviation = np.sqrt(2 / (9 * kernel.shape[-1]))
        np.testing.assert_allclose(kernel.std(), deviation, rtol=0.02)
        assert np.abs(kernel).max() > 3 * deviation


def test_the_cifar_stem_starts_as_a_plain_pytorch_convolution():
    kernel = resnet(depth=18, stem="cifar", size=32).get_layer("conv1").kernel.numpy()
    assert kernel.shape == (3, 3, 3, 64) and np.abs(kernel).max() <= 27 ** -0.5
    np.testing.assert_allclose(kernel.std(), 27 ** -0.5 / np.sqrt(3), rtol=0.05)


@pytest.mark.parametrize("depth, last", [(18, "bn2"), (50, "bn3")])
@pytest.mark.parametrize("zero", [False, True])
def test_zero_init_residual_zeroes_the_last_gamma_of_each_block(depth, last, zero):
    model = resnet(depth=depth, width=0.125, size=32, zero_init_residual=zero)
    starts = {layer.name: set(np.unique(layer.gamma)) for layer in model.layers if hasattr(layer, "gamma")}
    for name, values in starts.items():
        assert values == ({0.0} if zero and name.endswith(last) else {1.0}), name


def test_group_size_reaches_every_normalisation_and_survives_cloning():
    model = keras.models.clone_model(resnet(**SMALL, bn_group_size=4))
    assert {layer.group_size for layer in model.layers if hasattr(layer, "group_size")} == {4}


@pytest.mark.parametrize("policy", ["float64", "mixed_bfloat16"])
def test_precision_policies(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = resnet(**SMALL)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3))
    features = model(images, training=True)
    assert features.dtype == keras.mixed_precision.Policy(policy).compute_dtype
    assert np.isfinite(tf.cast(features, tf.float32)).all()


def test_grouped_convolutions_train():
    model = resnet(depth=50, width=0.125, groups=4, size=32, bn_group_size=2)

    @tf.function
    def gradients(images):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(images, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    for gradient in gradients(np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)):
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("arguments, message", [
    (dict(depth=20), r"18, 34, 50, 101, 152.*20"), (dict(stem="imagnet"), "imagenet, cifar.*'imagnet'"),
    (dict(depth=18, groups=2), "depth 18, groups 2")])
def test_what_does_not_exist_is_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        resnet(**arguments)


# CMC's encoders with their head, published: (depth, width) -> parameters for one channel, L, and for two, ab.
CMC_COUNTS = {
    (18, 0.5): (2_841_600, 2_844_736), (18, 1): (11_235_904, 11_239_040), (18, 2): (44_718_144, 44_721_280),
    (50, 0.5): (6_027_456, 6_030_592), (50, 1): (23_764_032, 23_767_168), (50, 2): (94_374_720, 94_377_856),
    (101, 0.5): (10_788_544, 10_791_680), (101, 1): (42_756_160, 42_759_296), (101, 2): (170_238_784, 170_241_920)}


@pytest.mark.parametrize("depth, width", CMC_COUNTS)
def test_parameter_counts_of_cmc(depth, width):
    with tf.Graph().as_default():
        found = count(encoder(resnet(depth, width, stem_channels=64, channels=1), linear).trainable_variables)
    assert (found, found + 49 * 64) == CMC_COUNTS[depth, width]    # a channel more, in the stem


@pytest.mark.parametrize("width, parameters", [(1, 23_770_304), (2, 94_380_992), (4, 376_152_512)])
def test_parameter_counts_of_insdis(width, parameters):
    with tf.Graph().as_default():
        assert count(encoder(resnet(50, width, stem_channels=64), linear).trainable_variables) == parameters


@pytest.mark.parametrize("depth, width, channels", [
    (50, 0.5, (64, 128, 256, 512, 1024, 1024)), (50, 1, (64, 256, 512, 1024, 2048, 2048)),
    (101, 2, (64, 512, 1024, 2048, 4096, 4096)), (18, 0.5, (64, 32, 64, 128, 256, 256)),
    (18, 2, (64, 128, 256, 512, 1024, 1024))])
def test_numbered_layers_have_the_shapes_of_cmcs_code(depth, width, channels):
    with tf.Graph().as_default():
        model = resnet(depth, width, stem_channels=64, size=224, channels=2)
        shapes = {number: model.get_layer(name).output_shape[1:] for number, name in numbered_layers(depth).items()}
    sides = (56, 56, 28, 14, 7)
    expected = {number: (side, side, outputs) for number, (side, outputs) in enumerate(zip(sides, channels), 1)}
    assert shapes == {**expected, 6: channels[-1:]}


def test_the_first_numbered_layer_of_a_cifar_stem_is_not_pooled():
    model = resnet(**SMALL, stem="cifar", stem_channels=16)
    shapes = [model.get_layer(name).output_shape[1:] for name in numbered_layers(18, "cifar").values()]
    assert shapes == [(32, 32, 16), (32, 32, 8), (16, 16, 16), (8, 8, 32), (4, 4, 64), (64,)]
