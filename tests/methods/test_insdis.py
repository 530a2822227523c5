"""InsDis and CMC: where losses start, how banks move, that replicas, XLA and both kinds of draw agree, and that CMC's
branches meet each other's banks."""

import math

import numpy as np
import pytest
import tensorflow as tf

from moco_tf import config as configs
from moco_tf.callbacks import Checkpoints
from moco_tf.errors import UsageError
from moco_tf.methods.insdis import CMC, InsDis
from moco_tf.optim.sgd import SGD
from moco_tf.train import build_method, open_workdir, restore_method

keras = tf.keras
KINDS = {"nce": dict(loss="nce", num_negatives=12),
         "followed": dict(loss="nce", num_negatives=12, partition_momentum=0.9),
         "softmax": dict(loss="softmax", num_negatives=12), "full": dict(loss="full"),
         "shared": dict(loss="nce", num_negatives=12, shared_negatives=True),
         "cmc": dict(branches=2, loss="nce", num_negatives=12), "cmc_softmax": dict(branches=3, loss="softmax", num_negatives=12),
         "cmc_full": dict(branches=2, loss="full"),
         "sharded": dict(loss="nce", num_negatives=12, shared_negatives=True, shard_bank=True),
         "sharded_full": dict(branches=2, loss="full", shard_bank=True)}


def build(dim=16, bank_size=40, temperature=0.2, jit_compile=False, lr=0.1, branches=1, method=InsDis, **options):
    keras.utils.set_random_seed(0)
    images = keras.Input((4, 4, 3))
    embedding = keras.layers.Dense(dim * branches, use_bias=False, name="embedding")
    encoder = keras.Model(images, embedding(keras.layers.Flatten()(images)))
    method = method(encoder, dim=dim, bank_size=bank_size, temperature=temperature, **options)
    method.compile(optimizer=SGD(lr), jit_compile=jit_compile)
    method.optimizer.build(method.trainable_weights)
    return method


def batch(step=0, images=8, bank_size=40):
    rng = np.random.default_rng(step)
    return {"query": tf.constant(rng.normal(size=(images, 4, 4, 3)), keras.backend.floatx()),
            "index": tf.constant(rng.permutation(bank_size)[:images])}


def state(method):
    return {v.name: v.numpy() for v in [*method.weights, *method.optimizer.variables]}


@pytest.mark.parametrize("loss, negatives, temperature, expected", [
    ("softmax", 4096, 0.07, 9.12), ("nce", 4096, 0.07, 10.11), ("softmax", 16384, 0.07, 10.50),
    ("nce", 16384, 0.07, 11.50), ("softmax", 4096, 0.1, 8.71), ("nce", 4096, 0.1, 9.71)])
def test_the_first_loss_of_random_features(loss, negatives, temperature, expected):
    """ln(K + 1) + 1 / (2 C T^2), one more for NCE with C = 128: figures of the reference, to 0.1."""
    logs = first_step(1024, loss=loss, num_negatives=negatives, temperature=temperature, shared_negatives=True)
    assert abs(float(logs["loss"]) - expected) < 0.1
    if loss == "nce":
        assert abs(float(logs["partition_ratio"]) - 1) < 0.02


@pytest.mark.parametrize("loss, expected", [("softmax", 9.12), ("nce", 10.11)])
def test_the_first_loss_with_negatives_of_each_querys_own(loss, expected):
    # The positives' logits have a deviation of 1.3, their mean over so few queries one of 0.16.
    assert abs(float(first_step(64, loss=loss, num_negatives=4096, temperature=0.07)["loss"]) - expected) < 0.4


def first_step(images, **options):
    return build(dim=128, bank_size=20000, **options).train_step(batch(images=images, bank_size=20000))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_the_rows_of_its_images_towards_their_features(kind):
    method = build(**KINDS[kind])
    before, views = method.banks[0].rows.numpy(), batch()
    index = views["index"].numpy()
    features = method.encoder(views["query"]).numpy()[:, :16]    # of the first branch
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    method.train_step(views)
    mixed = 0.5 * before[index] + 0.5 * features
    np.testing.assert_allclose(method.banks[0].rows.numpy()[index], mixed / np.linalg.norm(mixed, axis=1, keepdims=True),
                               rtol=1e-5, atol=1e-6)
    others = np.setdiff1d(np.arange(40), index)
    np.testing.assert_array_equal(method.banks[0].rows.numpy()[others], before[others])


def test_the_full_softmax_is_over_all_rows():
    method, views = build(loss="nce", num_negatives=0), batch()    # no negatives to draw: the full softmax
    features = method.encoder(views["query"]).numpy()
    logits = features / np.linalg.norm(features, axis=1, keepdims=True) @ method.banks[0].rows.numpy().T / 0.2
    own = logits[np.arange(8), views["index"]]
    total = np.exp(logits).sum(axis=1)
    logs = method.train_step(views)
    np.testing.assert_allclose(logs["loss"], np.mean(np.log(total) - own), rtol=1e-5)
    np.testing.assert_allclose(logs["accuracy"], np.mean(own == logits.max(axis=1)))
    np.testing.assert_allclose(logs["positive_probability"], np.mean(np.exp(own) / total), rtol=1e-5)


@pytest.mark.parametrize("momentum", [1.0, 0.9])
def test_z_stays_at_its_first_estimate_or_follows(momentum):
    method = build(loss="nce", num_negatives=12, partition_momentum=momentum)
    assert float(method.criteria[0].partition) == -1
    followed = []
    for step in range(3):
        method.train_step(batch(step))
        followed.append(float(method.criteria[0].partition))
    assert followed[0] > 0 and (followed[0] == followed[1] == followed[2]) == (momentum == 1)


def test_shared_and_own_draws_expect_the_same_loss():
    """Over many steps of an encoder that does not learn, on a bank that does not move."""
    drawn = []
    for shared in (False, True):
        method = build(loss="softmax", num_negatives=12, momentum=1.0, lr=0.0, shared_negatives=shared)
        method.banks[0].rows.assign(tf.math.l2_normalize(method.banks[0].rows, axis=1))
        step, views = tf.function(method.train_step), batch()
        drawn.append([float(step(views)["loss"]) for _ in range(300)])
    error = math.hypot(*np.std(drawn, axis=1)) / math.sqrt(300)
    assert abs(np.mean(drawn[0]) - np.mean(drawn[1])) < 4 * error
    assert error < 0.02


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_negatives_are_drawn_by_weights(shared, jit, tmp_path):
    """All weight on two rows: a query's 12 negatives are so many of the one, the others of the other."""
    weights = np.zeros(40)
    weights[[7, 23]] = 1, 3
    np.save(tmp_path / "weights.npy", weights)
    method = build(loss="softmax", num_negatives=12, shared_negatives=shared, weights=str(tmp_path / "weights.npy"),
                   momentum=1.0, lr=0.0)
    method.banks[0].rows.assign(tf.math.l2_normalize(method.banks[0].rows, axis=1))
    views, rows = batch(images=1), method.banks[0].rows.numpy()
    feature = method.encoder(views["query"]).numpy()[0]
    products = np.exp(rows @ (feature / np.linalg.norm(feature)) / 0.2)
    own, one, other = products[[int(views["index"][0]), 7, 23]]
    possible = np.log((own + np.arange(13) * one + np.arange(12, -1, -1) * other) / own)
    step = tf.function(method.train_step, jit_compile=jit)
    losses = np.array([float(step(views)["loss"]) for _ in range(100)])
    counts = np.abs(losses[:, None] - possible).argmin(axis=1)
    np.testing.assert_allclose(losses, possible[counts], rtol=1e-5)
    assert abs(counts.mean() - 12 / 4) < 4 * np.sqrt(12 * 3 / 16 / 100)    # binomial: 12 draws of 1/4, a hundred times


def test_the_weights_of_a_run_are_in_its_checkpoint(tmp_path):
    paths = [str(tmp_path / f"{name}.npy") for name in ("first", "second")]
    for path, row in zip(paths, (7, 23)):
        np.save(path, np.arange(40) == row)
    methods = [build(loss="softmax", num_negatives=12, weights=path) for path in paths]
    saved = tf.train.Checkpoint(methods[0]).write(str(tmp_path / "saved"))
    tf.train.Checkpoint(methods[1]).read(saved).expect_partial()
    np.testing.assert_array_equal(methods[1].table[1], np.full(40, 7))


def test_a_run_s_encoder_is_opened_where_its_file_of_weights_is_not(tmp_path):
    np.save(tmp_path / "weights.npy", np.arange(10_000))
    config = configs.with_option(configs.override(configs.load("insdis_quickstart"), **{
        "views.size": 8, "method.bank_size": 10_000, "method.loss": "softmax"}), "method.num_negatives", "4")
    config = configs.with_option(config, "method.weights", str(tmp_path / "weights.npy"))
    open_workdir(config, str(tmp_path / "run"), 10_000)
    method = build_method(config, 1)
    Checkpoints(method, str(tmp_path / "run" / "checkpoints")).save(0)
    (tmp_path / "weights.npy").unlink()
    again, stored, _ = restore_method(str(tmp_path / "run"))
    assert stored.method.weights.endswith("weights.npy")
    for ours, theirs in zip(again.encoder.weights, method.encoder.weights):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_non_finite_step_leaves_bank_and_z(kind):
    method = build(**KINDS[kind])
    before, views = state(method), batch()
    views["query"] = tf.tensor_scatter_nd_update(views["query"], [[0, 0, 0, 0]], [float("nan")])
    logs = tf.function(method.train_step)(views)
    after = state(method)
    assert int(logs["bad_steps"]) == 1
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert all("bad_" in name or "_bad" in name or "iteration" in name for name in changed), changed
    assert math.isfinite(float(tf.function(method.train_step)(batch(1))["loss"]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_step_compiles_and_agrees(kind):
    methods = [build(**KINDS[kind]) for _ in range(2)]
    steps = [tf.function(methods[0].train_step), tf.function(methods[1].train_step, jit_compile=True)]
    for step in range(3):
        plain, compiled = (one(batch(step)) for one in steps)
        np.testing.assert_allclose(plain["loss"], compiled["loss"], rtol=1e-5)
    one, other = map(state, methods)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_train_as_one(kind):
    """Five steps in float64, the bank and Z among the weights; an image comes twice, on different replicas."""
    keras.backend.set_floatx("float64")
    keras.mixed_precision.set_global_policy("float64")
    try:
        trained = [train_five_steps(kind, replicas) for replicas in (1, 2, 4)]
    finally:
        keras.backend.set_floatx("float32")
        keras.mixed_precision.set_global_policy("float32")
    for several in trained[1:]:
        for name, value in trained[0].items():
            np.testing.assert_allclose(several[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def train_five_steps(kind, replicas):
    """{name: value} of the losses and of all variables, which must be equal on all replicas."""
    strategy = tf.distribute.get_strategy()
    if replicas > 1:    # without collective kernels, whose keys clash between the strategies of one process
        strategy = tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)],
                                                  cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        method = build(**KINDS[kind])
        step_of_all = tf.function(lambda views: strategy.run(method.train_step, args=(views,)))
        losses = []
        for step in range(5):
            views = batch(step)
            views["index"] = tf.concat([views["index"][:7], views["index"][1:2]], axis=0)
            share = 8 // replicas
            dealt = {name: strategy.experimental_distribute_values_from_function(
                lambda context, view=view: view[context.replica_id_in_sync_group * share:][:share])
                for name, view in views.items()}
            losses.append(float(strategy.experimental_local_results(step_of_all(dealt)["loss"])[0]))
    values = {"losses": losses}
    for variable in [*method.weights, *method.optimizer.variables]:
        first, *others = (copy.numpy() for copy in strategy.experimental_local_results(variable))
        assert len(others) == replicas - 1 and all(np.array_equal(first, other) for other in others), variable.name
        values[variable.name] = first
    values.update({bank.name: bank.rows.numpy() for bank in method.banks})
    return values


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_trains_with_float32_losses_and_memory(precision):
    keras.mixed_precision.set_global_policy(precision)
    try:
        method = build(**KINDS["nce"])
        views = batch()
        views["query"] = tf.cast(views["query"], method.encoder.compute_dtype)
        logs = tf.function(method.train_step)(views)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert logs["loss"].dtype == method.banks[0].rows.dtype == method.criteria[0].partition.dtype == tf.float32
    assert int(logs["bad_steps"]) == 0 and math.isfinite(float(logs["loss"]))


def test_bank_and_z_are_in_the_checkpoint(tmp_path):
    method = build(**KINDS["nce"])
    method.train_step(batch())
    path = tf.train.Checkpoint(method).write(str(tmp_path / "saved"))
    again = build(**{**KINDS["nce"], "seed": 1})
    assert not np.array_equal(again.banks[0].rows, method.banks[0].rows)
    tf.train.Checkpoint(again).read(path).expect_partial()
    for one, other in ((method.banks[0].rows, again.banks[0].rows), (method.criteria[0].partition, again.criteria[0].partition)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("options, told", [
    (dict(loss="hinge"), "method.loss must be one of softmax, nce, full. Received: 'hinge'"),
    (dict(bank_size=0), "number of training images. Received: 0"),
    (dict(loss="nce", num_negatives=41), "Received: 41 negatives, 40 images"),
    (dict(loss="full", num_negatives=4), "Received: method.num_negatives 4"),
    (dict(momentum=1.5), "from 0 to 1. Received: 1.5"), (dict(momentum=-0.5), "from 0 to 1. Received: -0.5"),
    (dict(temperature=0.0), "temperature .* must be above 0. Received: 0.0"),
    (dict(loss="full", weights="w.npy"), "all images are scored. Received: w.npy")])
def test_settings_that_cannot_be_are_refused_in_one_line(options, told):
    with pytest.raises(UsageError, match=told) as refused:
        build(**options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_the_bank_does_not_know_stops_the_run(kind):
    views = batch()
    views["index"] = tf.tensor_scatter_nd_update(views["index"], [[3]], tf.constant([40], tf.int64))
    with pytest.raises(tf.errors.InvalidArgumentError, match="0 to 39"):
        tf.function(build(**KINDS[kind]).train_step)(views)


def test_chance_is_what_rows_alike_give():
    alike = {**batch(), "query": tf.ones((8, 4, 4, 3))}
    expectations = {"nce": math.log(13) + 12 * math.log(13 / 12), "softmax": math.log(13), "full": math.log(40)}
    for kind, expected in expectations.items():
        method = build(**KINDS[kind])
        method.banks[0].rows.assign(tf.fill((40, 16), 0.25))
        assert method.chance_loss(8) == pytest.approx(expected)
        np.testing.assert_allclose(method.train_step(alike)["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("branches", [2, 3])
def test_cmc_sums_the_losses_of_all_ordered_pairs_of_branches(branches):
    """Against NumPy: branch i's unit features on branch j's bank, for all i != j, and each bank moved by its own branch."""
    method, views = build(branches=branches, method=CMC, loss="full"), batch()
    rows = [bank.rows.numpy() for bank in method.banks]
    assert not np.array_equal(rows[0], rows[1])
    features = [part / np.linalg.norm(part, axis=1, keepdims=True)
                for part in np.split(method.encoder(views["query"]).numpy(), branches, axis=1)]
    index, expected = views["index"].numpy(), 0.0
    for i in range(branches):
        for j in range(branches):
            if i != j:
                logits = features[i] @ rows[j].T / 0.2
                expected += np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(8), index])
    logs = method.train_step(views)
    np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(sum(float(logs[name]) for name in logs if name.startswith("loss_")), expected, rtol=1e-5)
    for bank, before, own in zip(method.banks, rows, features):
        moved = 0.5 * before[index] + 0.5 * own
        np.testing.assert_allclose(bank.rows.numpy()[index], moved / np.linalg.norm(moved, axis=1, keepdims=True), rtol=1e-5,
                                   atol=1e-6)


def test_cmc_starts_at_twice_the_loss_of_one_direction():
    logs = first_step(1024, branches=2, loss="nce", num_negatives=16384, temperature=0.07, shared_negatives=True)
    assert abs(float(logs["loss"]) - 2 * 11.50) < 0.2


def test_cmc_needs_two_branches():
    with pytest.raises(UsageError, match="two or more"):
        build(method=CMC)
