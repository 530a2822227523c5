"""Un-Mix on every method: the loss in NumPy, that queries alone see mixtures, what is drawn, and that replicas, XLA and
a resume agree."""

import numpy as np
import pytest
import tensorflow as tf

import linear_methods
from linear_methods import DIM, batch, compiled, cross_entropy, flat, kernel_of, linear_encoder, state, unit_branches
from moco_tf.errors import UsageError
from moco_tf.methods.end_to_end import EndToEnd
from moco_tf.methods.image_mixture import unmixed
from moco_tf.methods.insdis import CMC, InsDis
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3

keras = tf.keras
TEMPERATURE = 0.2
MOCO = dict(dim=DIM, queue_size=20, temperature=TEMPERATURE, momentum=0.9, shuffle_bn="none")
FULL = dict(dim=DIM, bank_size=40, temperature=TEMPERATURE, loss="full")


def moco_v3(encoder, **options):
    embeddings = keras.Input((DIM,))
    turn = keras.layers.Dense(DIM, use_bias=False, kernel_initializer=keras.initializers.Orthogonal(seed=7),
                              name="turn")
    return dict(encoder=encoder, predictor=keras.Model(embeddings, turn(embeddings)), temperature=TEMPERATURE,
                momentum=0.9, **options)


# What a method is made of: its class, its encoder's branches, and its arguments from the encoder.
KINDS = {
    "moco": (MoCo, 1, lambda encoder: dict(encoder=encoder, **MOCO)),
    "moco_symmetric": (MoCo, 1, lambda encoder: dict(encoder=encoder, symmetric=True, **MOCO)),
    "moco_branches": (MoCo, 2, lambda encoder: dict(encoder=encoder, **MOCO)),
    "moco_v3": (MoCoV3, 1, moco_v3),
    "insdis": (InsDis, 1, lambda encoder: dict(encoder=encoder, **FULL)),
    "cmc": (CMC, 2, lambda encoder: dict(encoder=encoder, **FULL)),
    "end_to_end": (EndToEnd, 1, lambda encoder: dict(encoder=encoder, dim=DIM, temperature=TEMPERATURE,
                                                     shuffle_bn="none"))}


def build(kind, lr=0.1, plain=False, **mixture):
    method, branches, arguments = KINDS[kind]
    return compiled((method if plain else unmixed(method, **mixture))(**arguments(linear_encoder(branches))), lr)


def views_of(kind, step=0):
    return batch(step, names=("view_1", "view_2") if kind == "moco_v3" else ("query", "key"))


def drawn(method, images):
    """The mixture of images at the method's next step, in NumPy, and its ratio."""
    mixture, ratio = method.draw_mixture(images.shape)
    return mixture(images).numpy(), float(ratio)


# --- the loss ---


def in_batch(query, keys):
    return cross_entropy(query @ keys.T / TEMPERATURE, np.arange(len(query)))


def with_negatives(query, positive, negatives):
    logits = np.concatenate([(query * positive).sum(axis=1, keepdims=True), query @ negatives.T], axis=1) / TEMPERATURE
    return cross_entropy(logits, np.zeros(len(query), int))


def comparison(kind, method, views):
    """A function: queries, one list of branches a term of the loss -> (N,) losses, against the keys of whole images."""
    branches = KINDS[kind][1]
    pairs = [(0, 0)] if branches == 1 else [(0, 1), (1, 0)]
    if kind in ("insdis", "cmc"):
        banks, index = [bank.rows.numpy().astype(np.float64) for bank in method.banks], views["index"].numpy()
        return lambda terms: sum(cross_entropy(terms[0][i] @ banks[j].T / TEMPERATURE, index) for i, j in pairs)
    keys = {name: unit_branches(flat(views[name]) @ kernel_of(method.key_encoder), branches)
            for name in (("view_1", "view_2") if kind == "moco_v3" else ("query", "key"))}
    if kind == "moco_v3":
        return lambda terms: 2 * TEMPERATURE * (in_batch(terms[0][0], keys["view_2"][0])
                                                + in_batch(terms[1][0], keys["view_1"][0]))
    if kind == "end_to_end":
        return lambda terms: in_batch(terms[0][0], keys["key"][0])
    queues = np.split(method.queue.keys.numpy().astype(np.float64), branches, axis=1)
    return lambda terms: sum(with_negatives(term[i], keys[name][j], queues[j])
                             for term, name in zip(terms, ("key", "query")) for i, j in pairs)


def queries_of(kind, method, images):
    rows = flat(images) @ kernel_of(method.encoder)
    if kind == "moco_v3":
        rows = rows @ kernel_of(method.predictor)
    return unit_branches(rows, KINDS[kind][1])


@pytest.mark.parametrize("probability", [0, 1], ids=["boxes", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_queries_and_of_what_is_in_their_mixtures(kind, probability):
    """L(x) + r L(mix) + (1 - r) L(mix, reversed)."""
    method = build(kind, lr=0.0, probability=probability, seed=1)    # whose first boxes are not empty
    for step in range(2):
        views = views_of(kind, step)
        names = {"moco_v3": ("view_1", "view_2"), "moco_symmetric": ("query", "key")}.get(kind, ("query",))
        # The symmetric form mixes its first view only, which is the query of both terms.
        mixed = ["query", "query"] if kind == "moco_symmetric" else names
        ratio = drawn(method, views[names[0]])[1]
        clean = [queries_of(kind, method, views[name]) for name in names]
        mixtures = [queries_of(kind, method, drawn(method, views[name])[0]) for name in mixed]
        compare = comparison(kind, method, views)
        expected = compare(clean) + ratio * compare(mixtures) + (1 - ratio) * compare(
            [[rows[::-1] for rows in term] for term in mixtures])
        assert 0 < ratio < 1
        np.testing.assert_allclose(method.train_step(views)["loss"], expected.mean(), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_memories_are_of_whole_images(kind):
    """After a step they stand as the method without Un-Mix leaves them; the encoder does not."""
    trained = []
    for plain in (True, False):
        method = build(kind, plain=plain)
        method.train_step(views_of(kind))
        trained.append(state(method))
    one, other = trained
    same = {name for name in one if np.array_equal(one[name], other[name])}
    memories = {name for name in one if any(word in name for word in ("queue", "pointer", "rows", "partition"))}
    assert memories <= same and (memories or kind in ("moco_v3", "end_to_end"))
    assert any("embedding" in name and name not in same for name in one)
    if kind.startswith("moco"):    # the momentum encoder has followed before the step
        keys = method.key_encoder.weights[0]
        assert all(name in same for name, variable in linear_methods.variables_of(method).items() if variable is keys)


@pytest.mark.parametrize("method, arguments", [
    (MoCo, dict(**MOCO, loss="nce", num_images=40)),
    (InsDis, dict(FULL, loss="nce", num_negatives=12, partition_momentum=0.9))],
    ids=["moco", "insdis"])
def test_z_is_of_whole_images(method, arguments):
    one, other = (compiled(kind(linear_encoder(), **arguments), lr=0.0) for kind in (method, unmixed(method)))
    for step in range(3):
        ours, plain = other.train_step(batch(step)), one.train_step(batch(step))
        assert float(one.criteria[0].partition) == float(other.criteria[0].partition) > 0
        assert float(ours["accuracy"]) == float(plain["accuracy"]) and float(ours["loss"]) > float(plain["loss"])


def test_mixtures_are_scored_by_the_z_of_whole_images():
    """On the step that sets Z, too: as published, by NCE's terms in NumPy."""
    method = compiled(unmixed(MoCo, seed=1)(linear_encoder(), **MOCO, loss="nce", num_images=40), lr=0.0)
    views, queue = batch(), method.queue.keys.numpy().astype(np.float64)
    (keys,), (query,) = (unit_branches(flat(views[name]) @ kernel_of(method.encoder), 1) for name in ("key", "query"))
    images, ratio = drawn(method, views["query"])
    (mixture,) = unit_branches(flat(images) @ kernel_of(method.encoder), 1)

    def probabilities(queries):
        logits = np.concatenate([(queries * keys).sum(axis=1, keepdims=True), queries @ queue.T], axis=1) / TEMPERATURE
        return np.exp(logits)

    z, noise = 40 * probabilities(query).mean(), 20 / 40 + 1e-7

    def nce(queries):
        p = probabilities(queries) / z
        return (-np.log(p[:, 0] / (p[:, 0] + noise)) - np.log(20 / 40 / (p[:, 1:] + noise)).sum(axis=1)).mean()

    expected = nce(query) + ratio * nce(mixture) + (1 - ratio) * nce(mixture[::-1])
    assert 0 < ratio < 1
    np.testing.assert_allclose(method.train_step(views)["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(method.criteria[0].partition, z, rtol=1e-5)


@pytest.mark.parametrize("kind, passes", [("moco", 2), ("moco_symmetric", 4), ("moco_v3", 4), ("insdis", 2), ("cmc", 2),
                                          ("end_to_end", 2)])
def test_a_mixture_costs_one_more_pass_a_query(kind, passes):
    seen = []

    class Counted(keras.layers.Layer):
        def call(self, images):
            seen.append(images)
            return images

    method, branches, arguments = KINDS[kind]
    encoder, images = linear_encoder(branches), keras.Input((4, 4, 3))
    counted = keras.Model(images, encoder(Counted(name="counted")(images)))
    made = compiled(unmixed(method)(**arguments(counted)))
    views = views_of(kind)
    keys = made.encode_keys(views)
    mixtures = [drawn(made, views[name])[0] for name in made.query_names]
    seen.clear()
    made.contrastive_loss(views, keys)
    queries = [images.numpy() for images in seen]
    assert len(queries) == passes
    if kind == "moco_symmetric":    # both of the mixtures are the first view's
        mixtures = [mixtures[0]] * 2
    for ours, expected in zip(queries, [*(views[name].numpy() for name in made.query_names), *mixtures]):
        np.testing.assert_array_equal(ours, expected)


# --- what is drawn ---


@pytest.mark.parametrize("probability", [0, 0.5, 1])
def test_mixtures_are_whole_or_of_boxes_and_the_ratio_is_what_they_hold(probability):
    method = build("moco", probability=probability)
    values = tf.reshape(tf.range(8.0), (8, 1, 1, 1)) * tf.ones((8, 20, 12, 3))
    own, partner = values.numpy(), values.numpy()[::-1]
    ratios, whole = [], []
    for step in range(40):
        method.optimizer.iterations.assign(step)
        mixed, ratio = drawn(method, values)
        ratios.append(ratio)
        pasted = (mixed != own).any(axis=(0, 3))
        rows, columns = pasted.any(axis=1), pasted.any(axis=0)
        is_box = ((mixed == own) | (mixed == partner)).all()
        whole.append(not is_box)
        if is_box:
            assert np.array_equal(pasted, rows[:, None] & columns) and (mixed[:, pasted] == partner[:, pasted]).all()
            assert ratio == np.float32(1) - np.float32(pasted.sum()) / np.float32(20 * 12)    # exactly
            heights, widths = np.flatnonzero(rows), np.flatnonzero(columns)
            assert not pasted.any() or (np.ptp(heights) + 1 == len(heights) and np.ptp(widths) + 1 == len(widths))
        else:
            np.testing.assert_allclose(mixed, ratio * own + (1 - ratio) * partner, rtol=1e-5, atol=1e-5)
    assert len(set(ratios)) > 20 and min(ratios) >= 0 and max(ratios) <= 1
    assert {0: sum(whole) == 0, 0.5: 10 <= sum(whole) <= 30, 1: sum(whole) == 40}[probability]


def test_ratios_of_whole_mixtures_are_beta_distributed():
    """Beta(1, 1) is uniform, of variance 1/12; Beta(8, 8) has the variance 1 / (4 * 17)."""
    for beta, variance in ((1.0, 1 / 12), (8.0, 1 / 68)):
        method, ratios = build("insdis", probability=1, beta=beta), []
        ratio_of = tf.function(lambda: method.draw_mixture((8, 4, 4, 3))[1])
        for step in range(400):
            method.optimizer.iterations.assign(step)
            ratios.append(float(ratio_of()))
        assert abs(np.mean(ratios) - 0.5) < 4 * np.sqrt(variance / 400)
        assert abs(np.var(ratios) / variance - 1) < 0.25


def test_all_replicas_mix_by_the_same_ratio_and_box():
    strategy = linear_methods.strategy_of(4)
    with strategy.scope():
        method = build("moco")
        images = tf.reshape(tf.range(2 * 20 * 12 * 3, dtype=tf.float32), (2, 20, 12, 3))

        @tf.function
        def of_all():
            def here():
                mixture, ratio = method.draw_mixture(images.shape)
                return mixture(images), ratio

            return strategy.run(here)

        for step in range(4):
            method.optimizer.iterations.assign(step)
            for of_replicas in of_all():
                first, *others = (value.numpy() for value in strategy.experimental_local_results(of_replicas))
                assert len(others) == 3 and all(np.array_equal(first, other) for other in others)


def test_replicas_see_the_same_mixtures_as_one_when_images_meet_the_same_partners():
    """A replica mixes its own images among themselves, one of an even place always with one of an odd place."""
    def batches():
        for step in range(4):
            views = batch(step)
            yield {**views, "query": tf.tile(views["query"][:2], [4, 1, 1, 1])}

    linear_methods.assert_replicas_train_as_one(lambda: build("moco"), lambda: list(batches()))


def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path):
    method = build("moco")
    for step in range(2):
        method.train_step(batch(step))
    path = tf.train.Checkpoint(method).write(str(tmp_path / "saved"))
    again = build("moco")
    tf.train.Checkpoint(again).read(path).expect_partial()
    again.optimizer.iterations.assign(method.optimizer.iterations)    # a run's checkpoint has the optimizer, too
    for ours, expected in zip(drawn(again, batch(2)["query"]), drawn(method, batch(2)["query"])):
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(again.train_step(batch(2))["loss"], method.train_step(batch(2))["loss"])
    others = drawn(build("moco", seed=1), batch()["query"])[0]
    assert not np.array_equal(others, drawn(build("moco"), batch()["query"])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_step_compiles_and_agrees(kind):
    linear_methods.assert_compiles_and_agrees(lambda: build(kind), [views_of(kind, step) for step in range(4)])


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_twice_that_of_the_method(kind):
    assert build(kind).chance_loss(8) == pytest.approx(2 * build(kind, plain=True).chance_loss(8))


@pytest.mark.parametrize("options", [dict(probability=1.5), dict(probability=-0.1), dict(beta=0.0)])
def test_settings_that_cannot_be_are_refused_in_one_line(options):
    with pytest.raises(UsageError, match="mixture.probability from 0 to 1") as refused:
        unmixed(MoCo, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_mixes_half_precision_images(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        method = build("moco")
        views = {name: tf.cast(view, method.encoder.compute_dtype) if view.dtype.is_floating else view
                 for name, view in batch().items()}
        step = tf.function(method.train_step, autograph=False)    # both kinds of mixture are in it
        for _ in range(4):
            logs = step(views)
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert logs["loss"].dtype == tf.float32 and int(logs["bad_steps"]) == 0
