"""Config to objects to fit: the place where the parts meet."""

import functools
import importlib.metadata
import inspect
import json
import logging
import math
import platform
import time

import numpy as np
import tensorflow as tf

from moco_tf import __version__
from moco_tf import config as configs
from moco_tf.backbones import BACKBONES
from moco_tf.callbacks import (Checkpoints, Every, Log, StopOnSignal, StopWhenDiverged, append_line, keep_lines,
                               read_lines, saved_checkpoints, step_of)
from moco_tf.data import sources
from moco_tf.data.pipeline import BatchClock, Unreadable, evaluation_batches, training_batches
from moco_tf.errors import DataError, UsageError
from moco_tf.evaluation.features import Extractor
from moco_tf.evaluation.knn import knn_scores, top_k_accuracy, view_retrieval
from moco_tf.files import write_file
from moco_tf.heads import HEADS, encoder
from moco_tf.methods import METHODS
from moco_tf.optim import OPTIMIZERS
from moco_tf.optim.schedules import EpochSchedule
from moco_tf.views.ops import normalize
from moco_tf.views.recipes import RECIPES

keras = tf.keras

FEATURES = ("backbone", "embedding")
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16", "float64": "float64"}


# ---------------------------------------------------------------------------------------------- config to objects

def construct(table, section, kind, **extra):
    """table[section.name] called with the rest of the section; the signature is the schema.

    Raises:
        UsageError: a name that is not in the table, an argument that the constructor does not take.
    """
    arguments = {**section, **extra}
    name = arguments.pop("name")
    if name not in table:
        raise UsageError(f"{kind}.name must be one of {', '.join(sorted(table))}. Received: {name!r}.")
    takes = [key for key in inspect.signature(table[name]).parameters if key not in extra]
    unknown = sorted(set(arguments) - set(takes) - set(extra))
    if unknown:
        raise UsageError(f"{kind} {name!r} takes {', '.join(key for key in takes if key != 'kwargs')}. "
                         f"Received besides: {', '.join(unknown)}. Start from a recipe that has this {kind}.")
    return table[name](**arguments)


def view_recipe(config):
    return construct(RECIPES, config.views, "views")


def evaluation_recipe(config, source):
    """The view "image" that features are taken from; images that are no larger than it are taken whole."""
    size = config.views.size
    whole = {"shorter_side": size} if source.image_shape and max(source.image_shape[:2]) <= size else {}
    return construct(RECIPES, dict(name="eval", size=size, **whole), "views")


def normalizer(recipe):
    """uint8 images -> what the encoder takes, of the compute dtype of the Keras policy."""
    dtype = keras.mixed_precision.global_policy().compute_dtype
    return functools.partial(normalize, mean=recipe.mean, std=recipe.std, dtype=dtype)


def set_precision(precision):
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}. Received: {precision!r}.")
    keras.backend.set_floatx("float64" if precision == "float64" else "float32")
    keras.mixed_precision.set_global_policy(PRECISIONS[precision])


def build_encoder(config):
    """The query encoder of a config: images (N, S, S, 3) -> embeddings (N, C)."""
    size = config.views.get("size", 224)
    backbone = construct(BACKBONES, config.backbone, "backbone", size=size,
                         bn_group_size=config.bn_group_size or None)
    return encoder(backbone, lambda features: construct(HEADS, config.head, "head", features=features))


def build_method(config, steps_per_epoch, normalize_views=None):
    """The compiled method of a config, every variable made; call it under the strategy's scope."""
    keras.utils.set_random_seed(config.seed)
    method = construct(METHODS, config.method, "method", encoder=build_encoder(config), dim=config.head.dim,
                       shuffle_bn=config.shuffle_bn, bn_group_size=config.bn_group_size, seed=config.seed,
                       normalize=normalize_views, clip_norm=config.optimizer.clip_norm,
                       loss_scaling=config.precision == "float16")
    method.compile(optimizer=build_optimizer(config, steps_per_epoch), jit_compile=config.jit_compile,
                   steps_per_execution=config.steps_per_execution)
    method.optimizer.build(method.trainable_weights)
    return method


def learning_rate(config):
    """The effective one: lr_per_256 * batch_size / 256."""
    return config.optimizer.lr_per_256 * config.batch_size / 256


def build_schedule(config, steps_per_epoch):
    return EpochSchedule(base=learning_rate(config), epochs=config.epochs, steps_per_epoch=steps_per_epoch,
                         **config.schedule)


def build_optimizer(config, steps_per_epoch):
    arguments = {k: v for k, v in config.optimizer.items() if k not in ("lr_per_256", "clip_norm")}
    return construct(OPTIMIZERS, arguments, "optimizer", learning_rate=build_schedule(config, steps_per_epoch))


def open_data(config):
    """(training source, held-out source) of a config's data section; the second one may be None."""
    data = config.data
    common = dict(name=data.name, path=data.path, data_dir=data.data_dir)
    others = {key: data[key] for key in ("classes", "feature", "download") if data[key]}
    train = sources.open_source(split=data.split, **common, **others)
    if data.eval_split or sources.has_split(split="val", **common):
        return train, sources.open_source(split=data.eval_split or "val", **common, **others)
    if train.random_access and data.holdout > 0:
        return sources.split_holdout(train, data.holdout)
    return train, None


def check(config, size, replicas):
    """Raises UsageError for settings that cannot work together with `size` training images and so many replicas."""
    if config.method.name in METHODS:
        needed, drawn = METHODS[config.method.name].view_names, view_recipe(config).views
        if set(needed) != set(drawn):
            raise UsageError(f"The views must be those the method takes: {', '.join(needed)}. Received: views "
                             f"{config.views.name!r} with {', '.join(drawn)}.")
    if config.monitor.features not in FEATURES:
        raise UsageError(f"monitor.features must be one of {', '.join(FEATURES)}. Received: {config.monitor.features!r}.")
    if config.max_bad_steps < 1:
        raise UsageError(f"max_bad_steps must be at least 1. Received: {config.max_bad_steps}.")
    if config.jit_compile and replicas > 1:
        raise UsageError(f"jit_compile takes one replica: XLA compiles no collectives of several. Received: {replicas}. "
                         "Leave it out, or use --strategy=default.")
    batch = config.batch_size
    if batch > size:
        raise UsageError(f"A batch must not be larger than the data. Received: batch_size {batch}, {size} training "
                         f"images. Lower batch_size to at most {size}.")
    if batch < 1 or batch % replicas:
        raise UsageError(f"batch_size must be a positive multiple of the number of replicas. Received: batch_size "
                         f"{batch}, {replicas} replicas. Nearest: {max(1, round(batch / replicas)) * replicas}.")
    here, group = batch // replicas, config.bn_group_size or batch // replicas
    if here % group:
        raise UsageError(f"bn_group_size must divide the batch of a replica. Received: bn_group_size {group}, "
                         f"batch_size {batch} over {replicas} replica(s) = {here}. It may be any divisor of {here}.")
    if config.method.get("queue_size", batch) < batch:
        raise UsageError("The queue must hold at least one global batch, or a step would overwrite keys it has just "
                         f"written. Received: method.queue_size {config.method.queue_size}, batch_size {batch}. Raise "
                         "method.queue_size or lower batch_size.")
    if config.shuffle_bn not in ("input", "cross_replica", "none"):
        raise UsageError(f"shuffle_bn must be input, cross_replica or none. Received: {config.shuffle_bn!r}.")
    if config.epochs < 1:
        raise UsageError(f"epochs must be at least 1. Received: {config.epochs}.")


# ---------------------------------------------------------------------------------------------- the workdir

def open_workdir(config, workdir, images=0):
    """Makes the workdir and writes config.json; or, where a run has begun in it, checks that it is the same one.

    A run has begun with its first checkpoint after step 0, which is where imported weights stand.

    Args:
        images: the number of training images; 0: not known.

    Raises:
        UsageError: the workdir cannot be written; it holds a run of another config (the message lists the keys).
        DataError: the run was begun with another number of images.
    """
    path, facts = f"{workdir}/config.json", f"{workdir}/data.json"
    try:
        if tf.io.gfile.exists(path) and any(map(step_of, saved_checkpoints(f"{workdir}/checkpoints"))):
            stored = read_config(workdir)
            differing = configs.differences(stored, config)
            if differing:
                raise UsageError(f"The workdir {workdir} holds a run of another config, which would not be the same run "
                                 f"any more. Differing: {'; '.join(differing)}. Use the stored values, or another "
                                 "--workdir.")
            with tf.io.gfile.GFile(facts) as file:
                before = json.load(file)["images"]
            if before != images:
                raise DataError(f"A run goes on with the images it was begun with. Received: {images} of them, {before} "
                                f"before, in {workdir}. Restore the data, or start in another --workdir.")
        else:
            tf.io.gfile.makedirs(f"{workdir}/checkpoints")
            write_file(path, configs.to_json(config))
            write_file(facts, json.dumps({"images": images}) + "\n")
        write_file(f"{workdir}/.writable", "")
        tf.io.gfile.remove(f"{workdir}/.writable")
    except (tf.errors.OpError, OSError) as error:
        raise UsageError(f"--workdir must be a folder that can be written. Received: {workdir}: "
                         f"{str(getattr(error, 'message', error)).splitlines()[0]}.") from None


def read_config(workdir):
    """The config of a run.

    Raises:
        UsageError: no run is there, or its config cannot be read.
    """
    path = f"{workdir}/config.json"
    if not tf.io.gfile.exists(path):
        raise UsageError(f"The workdir must hold a run. Received: {workdir}, without a config.json.")
    try:
        with tf.io.gfile.GFile(path) as file:
            return configs.from_json(file.read())
    except ValueError as error:
        raise UsageError(f"{path} must hold a config as JSON. Received: {error}.") from None


def restore_method(workdir):
    """The method of a run with its newest checkpoint, on the current device.

    Returns:
        (method, config, step).

    Raises:
        UsageError: no run there, or it has saved nothing yet.
    """
    config = read_config(workdir)
    set_precision(config.precision)
    method = build_method(config, steps_per_epoch=1, normalize_views=normalizer(view_recipe(config)))
    step = Checkpoints(method, f"{workdir}/checkpoints").restore()
    if step is None:
        raise UsageError(f"The run must have saved a checkpoint. Received: {workdir}, without one. "
                         "`moco-tf pretrain` with this workdir goes on.")
    return method, config, step


# ---------------------------------------------------------------------------------------------- monitors

class Monitor:
    """Is it learning? kNN accuracy where there are labels, view retrieval in any case, both on held-out images.

    Args:
        config: of the run.
        train, held_out: sources.
        extractor: of the query encoder.
        path: of monitor.jsonl.
        writer: of tf.summary, or None.
        line: the `ProgressLine` to print above.
        unreadable: the training source's `Unreadable`.
    """

    def __init__(self, config, train, held_out, extractor, path, writer, line, unreadable):
        options = config.monitor
        recipe = view_recipe(config)
        whole = evaluation_recipe(config, train)
        batches = functools.partial(evaluation_batches, batch_size=config.batch_size, workers=config.data.workers)
        apart = Unreadable(held_out, limit=1.0)
        self.pairs = batches(held_out, recipe, limit=options.queries, seed=config.seed, unreadable=apart)
        self.labelled = train.num_classes > 0 and held_out.class_names == train.class_names
        self.bank = batches(train, whole, limit=options.bank, unreadable=unreadable)
        self.queries = batches(held_out, whole, limit=options.queries, unreadable=apart)
        self.extractor, self.num_classes, self.path, self.writer, self.line = \
            extractor, train.num_classes, path, writer, line
        self.k, self.temperature = options.k, options.temperature
        self.column = FEATURES.index(options.features)

    def measure(self):
        """{"knn_top1": in [0, 1], where there are labels, "view_retrieval": in [0, 1]}."""
        values = {}
        if self.labelled:
            bank, bank_labels, _ = self.whole_images(self.bank)
            queries, labels, _ = self.whole_images(self.queries)
            scores = knn_scores(bank[self.column], bank_labels, queries[self.column], self.k, self.temperature,
                                self.num_classes)
            values["knn_top1"] = top_k_accuracy(scores, labels)
        views, _, _ = self.extractor(self.pairs)
        (_, first), (_, second) = list(views.values())[:2]
        values["view_retrieval"] = view_retrieval(first, second)
        return values

    def whole_images(self, batches):
        """((features, embeddings), labels, index) of the bank or the queries."""
        views, labels, index = self.extractor(batches)
        return views["image"], labels, index

    def __call__(self, step):
        """Measures, shows and writes down; a step that is written down already is not measured again."""
        if any(record["step"] == step for record in read_lines(self.path)):
            return
        values = self.measure()
        append_line(self.path, {"step": step, **values})
        if self.writer:
            with self.writer.as_default(step=step):
                for name, value in values.items():
                    tf.summary.scalar(f"monitor/{name}", value)
        names = {"knn_top1": "kNN accuracy", "view_retrieval": "view retrieval"}
        self.line.above(f"step {step}: " + ", ".join(f"{names[k]} {v:.2%}" for k, v in values.items()) +
                        " (held-out images)")


# ---------------------------------------------------------------------------------------------- pre-training

def pretrain(config, workdir, strategy=None, reason=""):
    """Pre-trains the encoder of a config in `workdir`; a workdir that holds the same run is resumed.

    Args:
        config: complete, as from `moco_tf.config.load`.
        workdir: a folder, local or gs://, that holds everything of the run.
        strategy: of `tf.distribute`; None: the current one.
        reason: why this strategy, for the log.

    Returns:
        The contents of results.json.

    Raises:
        UsageError, DataError, DivergedError, Preempted: as their docstrings say; the workdir keeps what was saved.
    """
    strategy = strategy or tf.distribute.get_strategy()
    replicas = strategy.num_replicas_in_sync
    set_precision(config.precision)
    if config.jit_compile and not tf.config.list_physical_devices("GPU"):
        logging.warning("jit_compile on a CPU makes the step many times slower: XLA's convolutions are slow there")
    train, held_out = open_data(config)
    check(config, train.size, replicas)
    recipe = view_recipe(config)
    steps_per_epoch = train.size // config.batch_size
    total_steps = config.epochs * steps_per_epoch

    with strategy.scope():
        method = build_method(config, steps_per_epoch, normalizer(recipe))
        open_workdir(config, workdir, train.size)
        checkpoints = Checkpoints(method, f"{workdir}/checkpoints", config.checkpoint.keep)
        first_step = checkpoints.restore() or 0
    clock = BatchClock()
    keep_lines(f"{workdir}/monitor.jsonl", lambda record: 0 < first_step >= record["step"])
    writer = tf.summary.create_file_writer(f"{workdir}/tensorboard") if config.log.tensorboard else None
    _announce(config, train, held_out, first_step, steps_per_epoch, replicas, reason)

    unreadable = Unreadable(train, config.data.max_unreadable)

    def batches(context):
        return training_batches(
            train, recipe, config.batch_size, steps_per_epoch, config.seed, first_step,
            shuffle=config.shuffle_bn == "input", bn_group_size=config.bn_group_size,
            replicas=replicas // context.num_input_pipelines, context=context, workers=config.data.workers,
            unreadable=unreadable, clock=clock)

    chance = math.log(config.method.get("queue_size", config.batch_size - 1) + 1)
    log = Log(first_step, total_steps, steps_per_epoch, config.batch_size, config.log.every_steps,
              f"{workdir}/metrics.jsonl", writer, clock, chance, build_schedule(config, steps_per_epoch))
    stop = StopOnSignal(first_step, checkpoints)
    after = [StopWhenDiverged(first_step, config.max_bad_steps, checkpoints)]
    monitor = None
    began = time.time()
    try:
        with stop:
            if held_out is not None:
                extractor = Extractor(method.encoder, method.normalize)
                monitor = Monitor(config, train, held_out, extractor, f"{workdir}/monitor.jsonl", writer, log.line,
                                  unreadable)
                if first_step == 0:
                    monitor(first_step)
                after.append(Every(first_step, config.monitor.every_epochs * steps_per_epoch, monitor, log))
            after += [Every(first_step, config.checkpoint.every_steps, checkpoints.save, log), stop]
            if first_step < total_steps:
                dataset = strategy.distribute_datasets_from_function(batches)
                if first_step == 0:
                    _show_views(training_batches(train, recipe, config.batch_size, steps_per_epoch, config.seed,
                                                 shuffle=False), recipe, workdir, writer)
                method.fit(dataset, steps_per_epoch=total_steps - first_step, epochs=1, verbose=0,
                           callbacks=[log, *after])
                if step_of(checkpoints.good) != total_steps:
                    checkpoints.save(total_steps)
            if monitor:
                monitor(total_steps)
                if config.log.embeddings:
                    write_projector(workdir, *monitor.whole_images(monitor.queries))
    except tf.errors.ResourceExhaustedError as error:
        raise UsageError("A step must fit into the device's memory. Received: "
                         f"{_first_line_of(error)}. Lower batch_size or views.size, or use precision=bfloat16.") from None
    except tf.errors.OpError as error:
        raise unreadable.over_limit() or DataError(
            f"The input or the workdir failed while training: {_first_line_of(error)}. `moco-tf data check` looks at the "
            "images.") from None
    return _write_results(config, workdir, total_steps, log, time.time() - began, replicas, train)


def _first_line_of(error):
    return str(error.message).splitlines()[0] if error.message else type(error).__name__


def _announce(config, train, held_out, first_step, steps_per_epoch, replicas, reason):
    """What is about to run, and what is odd about it."""
    total = config.epochs * steps_per_epoch
    lines = [f"{train.size} images{f' in {train.num_classes} classes' if train.num_classes else ', no labels'}, "
             f"{held_out.size if held_out else 'no'} held out; {config.epochs} epochs of {steps_per_epoch} steps of "
             f"{config.batch_size} images; learning rate {learning_rate(config):.4g} "
             f"({config.optimizer.lr_per_256:.4g} per 256); {config.precision}",
             f"{replicas} replica(s){f', {reason}' if reason else ''}; BatchNorm over groups of "
             f"{config.bn_group_size or config.batch_size // replicas} images, shuffling BN: {config.shuffle_bn}"]
    queue = config.method.get("queue_size", 0)
    if queue:
        full = math.ceil(queue / config.batch_size)
        lines.append(f"queue of {queue} keys, first full of real ones at step {full}; the loss rises until then; "
                     f"chance is ln(K + 1) = {math.log(queue + 1):.2f}")
        if queue > train.size:
            lines.append(f"note: the queue spans {queue / train.size:.1f} epochs, so that a query meets old keys of its "
                         f"own image as negatives; a method.queue_size below {train.size} is usual.")
    group = config.bn_group_size or config.batch_size // replicas
    if config.shuffle_bn != "none" and group >= config.batch_size:
        lines.append("note: shuffling BN has no effect with one BatchNorm group for the whole batch; "
                     f"bn_group_size={max(2, config.batch_size // 8)} would have several.")
    if first_step:
        lines.append(f"resuming at step {first_step} of {total}")
    print("\n".join(lines), flush=True)


def _show_views(dataset, recipe, workdir, writer, count=8):
    """The first images' views, as a picture in the workdir and in TensorBoard: a row for each view."""
    batch = next(iter(dataset))
    rows = [np.concatenate(list(batch[name][:count].numpy()), axis=1) for name in recipe.views]
    grid = np.concatenate(rows, axis=0)
    with tf.io.gfile.GFile(f"{workdir}/views.png", "wb") as file:
        file.write(tf.io.encode_png(grid).numpy())
    if writer:
        with writer.as_default(step=0):
            tf.summary.image("views", grid[None])


def write_projector(workdir, rows, labels, index):
    """Features for TensorBoard's embedding projector: a table of rows, one of labels, and the pointer to both."""
    folder = f"{workdir}/tensorboard"
    tf.io.gfile.makedirs(folder)
    write_file(f"{folder}/features.tsv", "".join("\t".join(f"{v:.6g}" for v in row) + "\n" for row in rows[0]))
    write_file(f"{folder}/labels.tsv", "index\tlabel\n" + "".join(f"{i}\t{c}\n" for i, c in zip(index, labels)))
    write_file(f"{folder}/projector_config.pbtxt", 'embeddings {\n  tensor_name: "features"\n  tensor_path: '
               '"features.tsv"\n  metadata_path: "labels.tsv"\n}\n')


def _write_results(config, workdir, total_steps, log, seconds, replicas, train):
    path = f"{workdir}/results.json"
    before = {}
    if tf.io.gfile.exists(path):
        with tf.io.gfile.GFile(path) as file:
            before = json.loads(file.read())
    monitored = read_lines(f"{workdir}/monitor.jsonl")
    results = {"steps": total_steps, "seconds": round(seconds, 2), "images_per_s": round(log.images_per_s(), 2)}
    if log.trained_steps == 0 and before:    # a finished run, looked at again
        results.update({key: before[key] for key in results if key in before})
    for name in ("knn_top1", "view_retrieval"):
        measured = [record[name] for record in monitored if name in record]
        results[f"{name}_initial"] = measured[0] if measured else None
        results[f"{name}_final"] = measured[-1] if measured else None
    metrics = read_lines(f"{workdir}/metrics.jsonl")
    results.update(loss_final=metrics[-1]["loss"] if metrics else None, seed=config.seed, images=train.size,
                   replicas=replicas, config_hash=configs.digest(config), versions=versions())
    write_file(path, json.dumps(results, indent=2) + "\n")
    return results


def versions():
    """Of what computes."""
    return {"python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("tensorflow", "numpy")},
            "moco_tf": __version__}
