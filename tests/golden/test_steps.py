"""Training steps of MoCo against the reference's: every run of kinds `moco_steps`, `moco_v3_steps` whose model exists.

Compared after each step, as stored: losses, logits, gradient norms, parameters of both encoders and their norms,
BatchNorm statistics, and v1's and v2's queue and pointer, v3's predictor, learning rate and momentum; of Un-Mix the
three terms, too. Processes of the reference are replicas here, with the recorded shuffle, and the recorded mixtures.
"""

import re
import zlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.export.torch_weights import checkpoint_of, named_variables, state_dict
from moco_tf.methods import moco_v3
from moco_tf.methods.image_mixture import unmixed
from moco_tf.methods.moco import MoCo
from moco_tf.optim.adamw import AdamW
from moco_tf.optim.lars import LARS
from moco_tf.optim.schedules import EpochSchedule
from moco_tf.optim.sgd import SGD
from moco_tf.views import mixture

from . import replay, weights

keras = tf.keras


class Watched(MoCo):
    """Also returns what the files hold of a step: each replica's loss, and its first row of logits."""

    def compare(self, queries, keys):
        losses, outputs = super().compare(queries, keys)
        return losses, {**outputs, "losses": losses}

    def metrics_of(self, keys, outputs):
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        here = tf.one_hot(context.replica_id_in_sync_group, replicas, dtype=outputs["losses"].dtype)
        # The step takes the mean over the replicas, so a row that only one fills comes back whole times the number.
        return {"loss_of": replicas * here * tf.reduce_mean(outputs["losses"]),
                "logits_of": replicas * here[:, None] * outputs["logits"][0][0]}


TERMS = ("o", "m", "m_flip")    # of Un-Mix's loss: the queries, their mixtures, the mixtures in reversed order
WATCHED = {"loss_o": "loss", "loss_m": "loss", "loss_m_flip": "loss", "logits_m0": "logits", "logits_m_flip0": "logits",
           "lam_used": "loss"}    # what Un-Mix's runs hold besides, and whose tolerance it has


def watched_unmix(run, tag):
    """Un-Mix on `Watched` with the recorded ratios and boxes, the terms of the loss among what it returns."""
    dtype, terms = replay.DTYPES[tag], []

    class WatchedUnMix(unmixed(Watched)):
        def contrastive_loss(self, views, keys):
            terms.clear()
            losses, outputs = super().contrastive_loss(views, keys)
            of_terms = {f"loss_{name}": tf.reduce_mean(term) for name, (term, _) in zip(TERMS, terms)}
            rows = {f"logits_{name}0": its["logits"][0][0] for name, (_, its) in zip(TERMS, terms)}
            watched = {**of_terms, **rows, "lam_used": self.draw_mixture(views["query"].shape)[1]}
            return losses, {**outputs, "losses": losses, "watched": watched}

        def compare(self, queries, keys):
            terms.append(super().compare(queries, keys))
            return terms[-1]

        def draw_mixture(self, shape):
            box = tf.unstack(tf.gather(tf.constant(run["box"], tf.int32), self.optimizer.iterations))
            top, left, bottom, right = box
            box, whole = (top, bottom, left, right), top < 0
            ratio = tf.where(whole, tf.gather(tf.constant(run["lam"], dtype), self.optimizer.iterations),
                             tf.cast(mixture.ratio_of(box, *shape[1:3]), dtype))
            return lambda images: tf.where(whole, mixture.mix(images, ratio), mixture.paste(images, box)), ratio

        def metrics_of(self, keys, outputs):
            return {**super().metrics_of(keys, outputs), **outputs["watched"]}

    return WatchedUnMix


@pytest.mark.parametrize(**replay.cases("moco_steps", replay.has_encoder))
def test_steps(run, tag):
    settings = run.settings
    strategy = replay.strategy_of(settings["replicas"])
    with replay.precision(tag), strategy.scope():
        method = build(run, tag)
        step_of_all = tf.function(lambda views: strategy.run(method.train_step, args=(views,)))
        expected = Statistics(run, tag, checkpoint_of(method))
        for step in range(settings["steps"]):
            method.optimizer.learning_rate.assign(settings["lr"][step])
            gradient_norms = GradientNorms(method)
            results = step_of_all(views_of(run, tag, step, strategy))
            results = {name: strategy.experimental_local_results(value)[0] for name, value in results.items()}
            checkpoint = checkpoint_of(method)
            check_outputs(run, tag, step, results)
            passes = {"q": 2 if settings["mixture"] else 1, "k": 1}    # a step, which the reference counts one by one
            for side, state in (("q", checkpoint.encoder), ("k", checkpoint.key_encoder)):
                counted = run[f"{tag}/{side}/num_batches_tracked"][step]
                assert state["bn1.num_batches_tracked"] * passes[side] == counted
            assert checkpoint.pointer == run[f"{tag}/queue_ptr"][step]
            if tag == "f64":    # in float32 the files have tolerances for losses and logits only
                check_state(run, tag, step, checkpoint, gradient_norms(), expected)
    if tag == "f64":
        replay.check(run, tag, checkpoint.queue, run[f"{tag}/queue_final"], "queue_final")


def build(run, tag):
    """The method of a run, compiled, as it stands before the first step."""
    settings = run.settings
    kind = watched_unmix(run, tag) if settings["mixture"] else Watched
    method = kind(replay.build_encoder(settings), dim=settings["dim"], queue_size=settings["queue_size"],
                  temperature=settings["temperature"], momentum=settings["momentum"], shuffle_bn="input")
    rules = settings["optimizer"]
    method.compile(SGD(settings["lr"][0], rules["momentum"], rules["weight_decay"], rules["nesterov"]))
    method.optimizer.build(method.trainable_variables)
    method.queue.keys.assign(weights.draw(settings["queue"]))
    method.queue.pointer.assign(settings["queue_ptr"])
    return method


def views_of(run, tag, step, strategy):
    """The queries as they come, the keys in the recorded order, for each query the place of its key; by replica."""
    query, key = weights.draw(run.settings["inputs"], step=run.settings["first_step"] + step)
    assert "%08x" % zlib.crc32(query.tobytes() + key.tobytes()) == run.settings["inputs_crc32"][step]
    permutation = run["perm"][step] if run.settings["shuffle_bn"] else np.arange(len(key))
    views = {"query": query.astype(replay.DTYPES[tag]), "key": key[permutation].astype(replay.DTYPES[tag]),
             "key_position": np.argsort(permutation).astype(np.int32)}
    share = len(query) // strategy.num_replicas_in_sync
    return strategy.experimental_distribute_values_from_function(
        lambda context: {name: tf.constant(view[context.replica_id_in_sync_group * share:][:share])
                         for name, view in views.items()})


class GradientNorms:
    """PyTorch name -> gradient norm, since SGD's buffer becomes momentum * buffer + gradient + decay * parameter."""

    def __init__(self, method):
        self.optimizer, self.encoder = method.optimizer, method.encoder
        self.variables = list(method.trainable_variables)
        self.before = [(variable.numpy(), buffer.numpy())
                       for variable, buffer in zip(self.variables, self.optimizer.buffers)]

    def __call__(self):
        norms = {}
        for variable, (parameter, old), new in zip(self.variables, self.before, self.optimizer.buffers):
            gradient = new.numpy() - self.optimizer.momentum * old - self.optimizer.decay * parameter
            norms[variable.name] = np.linalg.norm(gradient)
        return {name: norms[variable.name] for name, variable in named_variables(self.encoder).items()
                if variable.name in norms}


class Statistics:
    """The BatchNorm statistics that are right here: the mean of what all replicas have seen.

    The reference's processes each keep their own, but all start every step from process 0's. So process r's value
    after a step is .9 of process 0's before it, and .1 of its own batch's; the mean over r of the latter counts here.
    """

    def __init__(self, run, tag, start):
        self.run, self.tag = run, tag
        self.process_0 = {("q", name): value for name, value in start.encoder.items()}
        self.process_0.update({("k", name): value for name, value in start.key_encoder.items()})
        self.ours = dict(self.process_0)

    def __call__(self, side, name, step):
        stored = [self.run.file[f"{prefix}/{self.tag}/{side}/{name}"][step]
                  for prefix in self.run.settings["replica_prefixes"]]
        first, key = len(stored[0]), (side, name)
        self.ours[key] = 0.9 * self.ours[key][:first] + np.mean(stored, axis=0) - 0.9 * self.process_0[key][:first]
        self.process_0[key] = stored[0]
        return self.ours[key]


def check_outputs(run, tag, step, results):
    for replica, prefix in enumerate(run.settings["replica_prefixes"]):
        for what, key in (("loss", "loss"), ("logits", "logits0")):
            wanted = run.file[f"{prefix}/{tag}/{key}"][step]
            tolerance = run.tolerance(tag, what, step)
            if tolerance is not None:
                replay.check(run, tag, results[f"{what}_of"][replica], wanted, f"{what} of step {step}", tolerance,
                             scale=max(abs(wanted), 1.0) if what == "loss" and tag == "f32" else None)
    for key in set(WATCHED).intersection(results):
        wanted = run[f"{tag}/{key}"][step]
        replay.check(run, tag, results[key], wanted, f"{key} of step {step}", run.tolerance(tag, WATCHED[key], step),
                     scale=max(abs(wanted), 1.0) if WATCHED[key] == "loss" and tag == "f32" else None)


def check_state(run, tag, step, checkpoint, gradient_norms, statistics):
    names = [str(name) for name in run["param_names"]]
    replay.check(run, tag, [gradient_norms[name] for name in names], run[f"{tag}/grad_norm"][step], "grad_norm")
    for side, state in (("q", checkpoint.encoder), ("k", checkpoint.key_encoder)):
        norms = [np.linalg.norm(state[name]) for name in names]
        replay.check(run, tag, norms, run[f"{tag}/{side}/param_norm"][step], f"{side} param_norm")
        for key in run.keys(f"{tag}/{side}/"):
            name = key.split("/")[-1]
            if name in state and "num_batches" not in name:
                wanted = statistics(side, name, step) if "running" in name else run[key][step]
                replay.check(run, tag, state[name].ravel()[:len(wanted)], wanted, f"{side} {name}")
    queue = checkpoint.queue.ravel()
    replay.check(run, tag, queue.sum(), run[f"{tag}/queue_sum"][step], "queue_sum")
    replay.check(run, tag, queue @ np.arange(queue.size) / queue.size, run[f"{tag}/queue_dot"][step], "queue_dot")


# ---- MoCo v3 --------------------------------------------------------------------------------------------------------

V3_IN_FLOAT32 = {"resnet": 2e-2, "vit": 1e-3}    # of parameters, in the golden README; the ResNet's are BatchNorm's


raw_rows = []    # what a step made unit rows of, in order: keys of both views, queries of both views


class WatchedV3(moco_v3.MoCoV3):
    """Also returns what the files hold of a step: terms of the loss, first rows, and the momentum in full precision."""

    def metrics_of(self, keys, outputs):
        positive = tf.range(outputs["logits"][0].shape[0])
        losses = [tf.reduce_mean(moco_v3.info_nce(term, positive)) for term in outputs["logits"]]
        _, k2, q1, _ = raw_rows
        return {"loss_terms": 2.0 * self.temperature * tf.stack(losses),
                "logits0": outputs["logits"][0][0], "q1_row0": q1[0], "k2_row0": k2[0], "m": keys["momentum"]}


@pytest.mark.parametrize(**replay.cases("moco_v3_steps", replay.has_encoder))
def test_steps_of_v3(run, tag, monkeypatch):
    settings, unit = run.settings, moco_v3.unit
    raw_rows.clear()
    monkeypatch.setattr(moco_v3, "unit", lambda rows: raw_rows.append(rows) or unit(rows))
    with replay.precision(tag):
        method = build_v3(run)
        step_once = tf.function(method.train_step)
        for step in range(settings["steps"]):
            views = weights.draw(settings["inputs"], step=settings["first_step"] + step)
            assert "%08x" % zlib.crc32(views[0].tobytes() + views[1].tobytes()) == settings["inputs_crc32"][step]
            results = step_once({name: tf.constant(view.astype(replay.DTYPES[tag]))
                                 for name, view in zip(method.view_names, views)})
            check_outputs_of_v3(run, tag, step, {**results, "lr": method.optimizer.learning_rate})
            check_state_of_v3(run, tag, step, method)


def build_v3(run):
    """The method of a run, compiled, as it stands before the first step."""
    settings = run.settings
    plan, rules = settings["schedule"], settings["optimizer"]
    positions = run.file[settings["position_embedding"]] if settings["position_embedding"] else None
    method = WatchedV3(replay.build_encoder(settings, positions=positions), replay.build_predictor(settings),
                       settings["temperature"], settings["momentum"], momentum_schedule="cosine",
                       total_steps=plan["epochs"] * plan["iterations_per_epoch"])
    schedule = EpochSchedule(plan["lr"], settings["base_lr"], plan["epochs"], plan["iterations_per_epoch"],
                             per_step=True, warmup_epochs=plan["warmup_epochs"])
    if rules["name"] == "lars":
        optimizer = normed(LARS)(schedule, rules["momentum"], rules["weight_decay"], rules["trust_coefficient"])
    else:
        optimizer = normed(AdamW)(schedule, rules["weight_decay"], *rules["betas"], rules["eps"])
    method.compile(optimizer)
    method.optimizer.build(method.trainable_variables)
    return method


def normed(optimizer):
    """The class of optimizer, made to keep the norm of each parameter's last gradient as well."""
    class Normed(optimizer):
        def build(self, var_list):
            super().build(var_list)
            if not getattr(self, "norms", None):
                self.norms = [tf.Variable(0.0, dtype=variable.dtype) for variable in var_list]

        def update_step(self, gradient, variable):
            self.norms[self._index_dict[self._var_key(variable)]].assign(tf.norm(gradient))
            super().update_step(gradient, variable)

    return Normed


def check_outputs_of_v3(run, tag, step, results):
    for key in ("loss", "loss_terms", "logits0", "q1_row0", "k2_row0"):
        replay.check(run, tag, results[key], run[f"{tag}/{key}"][step], f"{key} of step {step}",
                     run.tolerance(tag, "loss" if key.startswith("loss") else "logits", step))
    for key in ("lr", "m"):
        np.testing.assert_allclose(results[key], run[f"{tag}/{key}"][step], rtol={"f64": 1e-12, "f32": 2e-6}[tag])


def check_state_of_v3(run, tag, step, method):
    settings = run.settings
    left_out = settings["not_compared"]
    tolerance = run.tolerance(tag) if tag == "f64" else V3_IN_FLOAT32[settings["backbone"]["family"]]
    models = {"base": method.encoder, "momentum": method.key_encoder, "predictor": method.predictor}
    norms = {variable.ref(): norm for variable, norm in zip(method.trainable_variables, method.optimizer.norms)}
    for side, model in models.items():
        variables = {file_name(run, name): variable for name, variable in named_variables(model).items()}
        state = {file_name(run, name): value for name, value in state_dict(model).items()}
        listed = [str(name) for name in run["predictor_param_names" if side == "predictor" else "param_names"]]
        compared = np.array([name not in left_out for name in listed])
        ours, wanted = np.array([np.linalg.norm(state[name]) for name in listed]), run[f"{tag}/{side}/param_norm"][step]
        replay.check(run, tag, ours[compared], wanted[compared], f"{side} norms", tolerance)
        if side != "momentum":
            wanted = run[f"{tag}/grad_norm" if side == "base" else f"{tag}/predictor/grad_norm"][step]
            ours = np.array([norms.get(variables[name].ref(), np.nan) for name in listed], np.float64)
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(wanted))    # the frozen ones
            compared &= np.isfinite(wanted)
            replay.check(run, tag, ours[compared], wanted[compared], f"{side} gradient norms", tolerance)
        for key in run.keys(f"{tag}/{side}/"):
            name, wanted = key.split("/", 2)[2], run[key][step]
            if not name.endswith("_norm") and name not in left_out:
                replay.check(run, tag, slice_of(state, name)[:len(wanted)], wanted, f"{side} {name}", tolerance)


def file_name(run, name):
    """The name in the files of a parameter of ours: a transformer's projector is `head` there, a predictor has none."""
    head = run.settings["head"]["modules"][0]["name"].split(".")[0]
    return re.sub(r"^fc\b", head, name).replace("predictor.", "")


def slice_of(state, name):
    """A parameter, or a third of one, as in `attn.qkv.bias/v`; flat."""
    name, _, third = name.partition("/")
    return np.split(state[name].ravel(), 3)["qkv".index(third)] if third else state[name].ravel()
