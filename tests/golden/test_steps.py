"""Training steps of MoCo against the reference's: every run of kind `moco_steps` whose model exists here.

Compared after each step, as stored: losses, logits, gradient norms, parameters of both encoders and their norms,
BatchNorm statistics, queue and pointer. Processes of the reference are replicas here, with the recorded shuffle.
"""

import zlib

import numpy as np
import pytest
import tensorflow as tf

from moco_tf.export.torch_weights import checkpoint_of, named_variables
from moco_tf.methods.moco import MoCo
from moco_tf.optim.sgd import SGD

from . import replay, weights

keras = tf.keras


class Watched(MoCo):
    """Also returns what the files hold of a step: each replica's loss, and its first row of logits."""

    def contrastive_loss(self, views, keys):
        losses, outputs = super().contrastive_loss(views, keys)
        return losses, {**outputs, "losses": losses}

    def metrics_of(self, keys, outputs):
        context = tf.distribute.get_replica_context()
        replicas = context.num_replicas_in_sync
        here = tf.one_hot(context.replica_id_in_sync_group, replicas, dtype=outputs["losses"].dtype)
        # The step takes the mean over the replicas, so a row that only one fills comes back whole times the number.
        return {"loss_of": replicas * here * tf.reduce_mean(outputs["losses"]),
                "logits_of": replicas * here[:, None] * outputs["logits"][0]}


def has_method(settings):
    """No image mixture yet (Un-Mix)."""
    return replay.has_encoder(settings) and settings["mixture"] is None


@pytest.mark.parametrize(**replay.cases("moco_steps", has_method))
def test_steps(run, tag):
    settings = run.settings
    strategy = replay.strategy_of(settings["replicas"])
    with replay.precision(tag), strategy.scope():
        method = build(settings)
        step_of_all = tf.function(lambda views: strategy.run(method.train_step, args=(views,)))
        expected = Statistics(run, tag, checkpoint_of(method))
        for step in range(settings["steps"]):
            method.optimizer.learning_rate.assign(settings["lr"][step])
            gradient_norms = GradientNorms(method)
            results = step_of_all(views_of(run, tag, step, strategy))
            results = {name: strategy.experimental_local_results(value)[0] for name, value in results.items()}
            checkpoint = checkpoint_of(method)
            check_outputs(run, tag, step, results)
            for side, state in (("q", checkpoint.encoder), ("k", checkpoint.key_encoder)):
                assert state["bn1.num_batches_tracked"] == run[f"{tag}/{side}/num_batches_tracked"][step]
            assert checkpoint.pointer == run[f"{tag}/queue_ptr"][step]
            if tag == "f64":    # in float32 the files have tolerances for losses and logits only
                check_state(run, tag, step, checkpoint, gradient_norms(), expected)
    if tag == "f64":
        replay.check(run, tag, checkpoint.queue, run[f"{tag}/queue_final"], "queue_final")


def build(settings):
    """The method of a run, compiled, as it stands before the first step."""
    method = Watched(replay.build_encoder(settings), dim=settings["dim"], queue_size=settings["queue_size"],
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
