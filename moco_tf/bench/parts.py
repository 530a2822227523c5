"""A recipe's training step as a case of `in_turns`: the whole as `fit` runs it, each part alone, and the operations.

A part is a function of its own on the method's own variables, in a loop inside the graph. What a part needs of the
others is computed beforehand.
"""

import collections
import glob
import math
import re
import tempfile
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from moco_tf import config as configs
from moco_tf.bench.timing import peak_mib, timed
from moco_tf.data.pipeline import training_batches
from moco_tf.data.sources import Black
from moco_tf.distribute import apply_gradients_if, make_strategy, mean_over_replicas, set_intra_op_threads
from moco_tf.momentum import momentum_update
from moco_tf.train import (bn_group, build_method, check, image_mixture, input_recipe, normalizer, set_precision,
                           view_names, view_recipe)

keras = tf.keras

IMAGES = 1281167        # ImageNet's, of which a memory bank has a row each
TURN_S, PART_S = 3.0, 0.5    # about so long a turn's steps take, and a part of it
PRODUCTS = {"CPU": 2048, "GPU": 8192, "TPU": 8192}    # side of the square matrices whose product is the device's peak
PRODUCT = re.compile("Conv[23]D|Conv2d|MatMul|Einsum")
CONTAINERS = re.compile("^_?(Stateless|Stateful)?(If|While|PartitionedCall)$")    # their contents are on record besides


class StepRound(NamedTuple):
    """A `Round` of whole steps, and what was measured beside it."""

    units: int
    wall_s: float
    cpu_s: float
    parts: dict        # name -> Round
    product: tuple     # the Round of the large matrix product
    operations: dict   # kind of operation -> seconds in a step, of all threads; {}: not known


def training_step(config, strategy, steps):
    """A case of `in_turns`, of `StepRound`s.

    Args:
        config: as JSON.
        strategy: arguments of `make_strategy`.
        steps: in a turn; 0: as many as take about three seconds.

    Raises:
        UsageError: a config that cannot be trained so.
    """
    config = configs.from_json(config)
    tf.get_logger().setLevel("ERROR")    # it warns of the traces of parts, which are different functions
    for gpu in tf.config.list_physical_devices("GPU"):    # or one case would take all of it from the others
        tf.config.experimental.set_memory_growth(gpu, True)
    set_intra_op_threads(config.intra_op_threads)
    strategy, reason = make_strategy(**strategy)
    images = config.method.get("bank_size") or config.method.get("num_images") or max(IMAGES, config.batch_size)
    check(config, images, strategy.num_replicas_in_sync, view_names(config))
    set_precision(config.precision)
    with strategy.scope():
        method = build_method(config, IMAGES // config.batch_size or 1, normalizer(view_recipe(config)))
    batches = iter(strategy.distribute_datasets_from_function(
        lambda context: made_up(config, images, strategy.num_replicas_in_sync // context.num_input_pipelines)))
    train, at_once = method.make_train_function(), config.steps_per_execution

    def take(count):
        for _ in range(math.ceil(count / at_once)):
            train(batches)
        tf.test.experimental.sync_devices()

    first_s = timed(lambda: take(1), units=1).wall_s
    take(1)
    steps = math.ceil((steps or TURN_S / timed(lambda: take(1), units=1).wall_s * at_once) / at_once) * at_once
    device = device_kind()
    facts = {"replicas": strategy.num_replicas_in_sync, "strategy": reason, "device": device, "steps": steps,
             "parameters": sum(int(np.prod(weight.shape)) for weight in method.trainable_weights),
             "first_call_s": first_s, "step_peak_mib": device_peak_mib(device)}
    parts, facts["multiply_adds"] = timed_parts(method, strategy, next(batches), config.jit_compile)
    facts["product_side"] = PRODUCTS[device]
    facts["devices"] = 1 if device == "CPU" else strategy.num_replicas_in_sync
    product = matrix_product(PRODUCTS[device], keras.mixed_precision.global_policy().compute_dtype)
    profiled = device == "CPU" and not config.jit_compile    # elsewhere operations run fused, under other names
    yield facts
    while True:
        whole = timed(lambda: take(steps), units=steps)
        yield StepRound(*whole, {name: part() for name, part in parts.items()}, product(),
                        profile(lambda: take(at_once), at_once) if profiled else {})


def device_kind():
    return next(kind for kind in ("TPU", "GPU", "CPU") if tf.config.list_logical_devices(kind))


def device_peak_mib(device):
    """The most memory held so far: of the first GPU, or of this process."""
    return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2 ** 20 if device == "GPU" else peak_mib()


# ---------------------------------------------------------------------------------------------- views

def made_up(config, images, replicas):
    """One batch again and again, dealt to the replicas: what the recipe's pipeline hands out, of so many random images."""
    recipe, random = view_recipe(config), np.random.default_rng(config.seed)
    batches = training_batches(
        Black(images, config.data.channels), input_recipe(config, recipe), config.batch_size, steps_per_epoch=1, seed=0,
        shuffle=config.shuffle_bn == "input", bn_group_size=bn_group(config, replicas), repeats=config.data.repeats,
        mixture=image_mixture(config), replicas=replicas)

    def made(value):
        if value.shape.rank != 4:
            return value
        levels = (random.integers(256, size=value.shape) if value.dtype == tf.uint8 else
                  random.normal(size=value.shape))
        return tf.cast(levels, value.dtype)

    shares = [{name: made(value) for name, value in share.items()} for share in batches.take(replicas)]
    views = {name: tf.stack([share[name] for share in shares]) for name in shares[0]}
    return tf.data.Dataset.from_tensor_slices(views).cache().repeat().prefetch(2 * replicas)


# ---------------------------------------------------------------------------------------------- parts

def timed_parts(method, strategy, views, jit_compile=False):
    """({name: a function that runs this part of the step a few times and returns the Round}, multiply-adds of a step).

    The multiply-adds are those of all convolutions and matrix products, forwards and backwards, on all replicas.
    """
    @tf.function(autograph=False)
    def prepared(views):
        return strategy.run(lambda views: _prepared(method, views), args=(views,))

    graph = prepared.get_concrete_function(views)
    given = graph(views)
    parts = {name: repeated(strategy, part, [given[key] for key in needs], jit_compile)
             for name, (part, *needs) in _parts(method, strategy.num_replicas_in_sync).items()}
    return parts, multiply_adds(graph.outputs)


def _prepared(method, raw):
    views = method.prepared(raw)
    with tf.GradientTape() as tape:
        keys = method.encode_keys(views)
        losses, outputs = method.contrastive_loss(views, keys)
        loss = tf.reduce_mean(losses)
    return {"raw": raw, "views": views, "keys": keys, "queries": outputs["queries"], "outputs": outputs,
            "gradients": tape.gradient(loss, method.trainable_weights)}


def _parts(method, replicas):
    """{name: (function of one replica, what of `_prepared` it takes ...)}; what a method has not is left out."""
    weights = method.trainable_weights

    def keys(views):
        with tf.GradientTape() as tape:
            keys = method.encode_keys(views)
        return keys, tape.gradient(_floats(keys), weights)    # None but where keys learn

    def queries(views):
        with tf.GradientTape() as tape:
            queries = method.encode_queries(views)
        return queries, tape.gradient(queries, weights)

    def logits(queries, keys):
        learning = _floats([queries, keys.get("all") if not hasattr(method, "momentum") else None])
        with tf.GradientTape() as tape:
            tape.watch(learning)
            losses, outputs = method.compare(queries, keys)
            loss = tf.reduce_mean(losses)
        return loss, method.metrics_of(keys, outputs), tape.gradient(loss, learning)

    def ema(views):
        del views
        momentum = method.momentum_now() if hasattr(method, "momentum_now") else method.momentum
        momentum_update(method.key_encoder, method.encoder, momentum)

    def optimizer(gradients):
        norm = tf.linalg.global_norm(gradients)
        if method.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, method.clip_norm, use_norm=norm)
        apply_gradients_if(tf.math.is_finite(norm), method.optimizer, gradients, weights)

    def memory(keys, outputs):
        method.update_memory(keys, outputs, write=tf.constant(True))

    parts = {"views": (method.prepared, "raw"), "keys": (keys, "views")}
    if hasattr(method, "momentum"):
        parts["EMA"] = (ema, "views")
    parts["queries, forward and back"] = (queries, "views")
    parts["logits, loss, gradient"] = (logits, "queries", "keys")
    if replicas > 1:
        parts["mean of gradients"] = (lambda gradients: mean_over_replicas(gradients), "gradients")
    return {**parts, "optimizer": (optimizer, "gradients"), "memory": (memory, "keys", "outputs")}


def _floats(nest):
    return [value for value in tf.nest.flatten(nest) if tf.is_tensor(value) and value.dtype.is_floating]


def repeated(strategy, part, args, jit_compile=False):
    """A function that runs `part(*args)` on every replica often enough to be timed; returns the Round."""
    part = tf.function(part, jit_compile=True, autograph=False) if jit_compile else part

    @tf.function(autograph=False)
    def run(times, args):
        def once(done, touched):
            return done + 1, touched + _touched(strategy, strategy.run(part, args=args))

        # One after the other, as the steps of a run are.
        return tf.while_loop(lambda done, _: done < times, once, [0, 0.0], parallel_iterations=1)

    def take(times):
        run(tf.constant(times), args)
        tf.test.experimental.sync_devices()

    take(1)
    times = min(100, max(1, round(PART_S / timed(lambda: take(1), units=1).wall_s)))
    return lambda: timed(lambda: take(times), units=times)


def _touched(strategy, outputs):
    """A number with something of every tensor in it, or TensorFlow would leave out what nobody looks at."""
    values = [value for each in tf.nest.flatten(outputs) if each is not None
              for value in strategy.experimental_local_results(each) if tf.is_tensor(value)]
    return tf.add_n([tf.cast(tf.reshape(value, [-1])[0], tf.float32) for value in values] or [tf.constant(0.0)])


def matrix_product(side, dtype):
    """A function that multiplies two square matrices a few times; returns the Round."""
    a, b = (tf.cast(tf.random.stateless_normal((side, side), (0, i)), dtype) for i in range(2))
    return repeated(tf.distribute.get_strategy(), tf.matmul, (a, b))


# ---------------------------------------------------------------------------------------------- operations

def multiply_adds(tensors):
    """Of all convolutions and matrix products that tensors of a graph take, gradients' among them.

    A convolution has kernel height x width x input channels (of a group) of them for each value of its output, and so
    have its two gradients. Operations that a graph holds for nobody, such as the gradient to the images, do not run and
    do not count; the insides of functions and loops are not looked at.
    """
    seen, left = set(), [tensor.op for tensor in tensors]
    while left:
        op = left.pop()
        if op not in seen:
            seen.add(op)
            left += [*op.control_inputs, *(tensor.op for tensor in op.inputs)]
    return sum(map(_multiply_adds, seen))


def _multiply_adds(op):
    size = {"Conv2D": lambda: _size(op.outputs[0]) * _size(op.inputs[1].shape[:3]),
            "Conv2DBackpropInput": lambda: _size(op.inputs[2]) * _size(op.inputs[1].shape[:3]),
            "Conv2DBackpropFilter": lambda: _size(op.inputs[2]) * _size(op.outputs[0].shape[:3]),
            "DepthwiseConv2dNative": lambda: _size(op.outputs[0]) * _size(op.inputs[1].shape[:2]),
            "DepthwiseConv2dNativeBackpropInput": lambda: _size(op.inputs[2]) * _size(op.inputs[1].shape[:2]),
            "DepthwiseConv2dNativeBackpropFilter": lambda: _size(op.inputs[2]) * _size(op.outputs[0].shape[:2]),
            "MatMul": lambda: _size(op.outputs[0]) * op.inputs[0].shape[0 if op.get_attr("transpose_a") else 1],
            "BatchMatMulV2": lambda: _size(op.outputs[0]) * op.inputs[0].shape[-2 if op.get_attr("adj_x") else -1],
            "Einsum": lambda: _of_einsum(op)}
    return size[op.type]() if op.type in size else 0


def _size(shape):
    return tf.TensorShape(getattr(shape, "shape", shape)).num_elements()


def _of_einsum(op):
    if len(op.inputs) == 1:
        return 0
    terms, _, kept = op.get_attr("equation").decode().partition("->")
    sizes = {}
    for term, value in zip(terms.split(","), op.inputs):
        before, _, after = term.partition("...")
        sizes.update(zip(before, value.shape))
        sizes.update(zip(reversed(after), reversed(value.shape)))
    return _size(op.outputs[0]) * math.prod(length for label, length in sizes.items() if label not in kept)


def profile(function, steps):
    """{kind of operation: seconds that all operations of it took in a step}, added over the threads, of a CPU."""
    kinds = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        try:
            function()
        finally:
            tf.profiler.experimental.stop()
        for file in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True):
            space = xplane_pb2.XSpace()
            with open(file, "rb") as record:
                space.ParseFromString(record.read())
            for plane in space.planes:
                for line in plane.lines:
                    for event in line.events:
                        # An operation is on record as name:Type; what else is has other forms.
                        named = re.fullmatch(r"[^:]+:(\w+)", plane.event_metadata[event.metadata_id].name)
                        if named and not CONTAINERS.match(named[1]):
                            kinds[re.sub("^_(Mkl)?(Native)?", "", named[1])] += event.duration_ps / 1e12 / steps
    return dict(kinds)


def share_outside_products(operations):
    """Of the operations' time, the share outside convolutions and matrix products; None where nothing is known."""
    if not operations:
        return None
    return 1 - sum(seconds for kind, seconds in operations.items() if PRODUCT.search(kind)) / sum(operations.values())
