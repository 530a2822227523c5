"""Config to objects to fit: the place where the parts meet."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import inspect
import json
import logging
import math
import platform
import re
import time

import numpy as np
import tensorflow as tf

from moco_tf import __version__
from moco_tf import config as configs
from moco_tf.backbones import BACKBONES
from moco_tf.backbones.branches import branched_backbone, branched_head
from moco_tf.callbacks import (Checkpoints, Every, Log, Monitor, StopOnSignal, StopWhenDiverged, keep_lines, read_lines,
                               saved_checkpoints, step_of)
from moco_tf.data import sources
from moco_tf.data.pipeline import BatchClock, Unreadable, UnreadableElsewhere, partners_of, training_batches
from moco_tf.data.service import DataService
from moco_tf.distribute import LOST, Hosts
from moco_tf.errors import DataError, MocoError, Preempted, UsageError
from moco_tf.evaluation.features import Extractor
from moco_tf.evaluation.monitor import PretrainingMeasures
from moco_tf.files import write_file
from moco_tf.heads import HEADS, encoder, predictor
from moco_tf.methods import METHODS
from moco_tf.methods.image_mixture import unmixed
from moco_tf.optim import OPTIMIZERS
from moco_tf.optim.schedules import EpochSchedule
from moco_tf.views.image_mixture import MIXTURES
from moco_tf.views.recipes import RECIPES

keras = tf.keras

FEATURES = ("backbone", "embedding")
NORMALIZE = ("step", "input")
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16", "float64": "float64"}


# ---------------------------------------------------------------------------------------------- config to objects

def construct(table, section, kind, offered=(), **extra):
    """table[section.name] called with the rest of the section; the signature is the schema.

    Args:
        table: {name: constructor}.
        section: of the config; its other keys are arguments.
        kind: what is built, for messages.
        offered: {argument: value} of which the constructor gets those that it names.
        extra: arguments that every constructor of this kind gets.

    Raises:
        UsageError: a name that is not in the table, an argument that the constructor does not take.
    """
    arguments = dict(section)
    name = arguments.pop("name")
    if name not in table:
        raise UsageError(f"{kind}.name must be one of {', '.join(sorted(table))}. Received: {name!r}.")
    signature = inspect.signature(table[name]).parameters
    given = {**extra, **{key: value for key, value in dict(offered).items() if key in signature}}
    takes = [key for key in signature if key not in given]
    missing = [key for key in takes if key not in arguments and signature[key].default is inspect.Parameter.empty
               and signature[key].kind is not inspect.Parameter.VAR_KEYWORD]
    if missing:
        raise UsageError(f"{kind} {name!r} needs {', '.join(missing)}. Received: "
                         f"{', '.join(arguments) or 'nothing'}. Start from a recipe that has this {kind}.")
    unknown = sorted(set(arguments) - set(takes))
    if unknown:
        raise UsageError(f"{kind} {name!r} takes {', '.join(key for key in takes if key != 'kwargs')}. "
                         f"Received besides: {', '.join(unknown)}. Start from a recipe that has this {kind}.")
    return table[name](**arguments, **given)


TABLES = {"method": METHODS, "mixture": {**MIXTURES, "unmix": unmixed}, "views": RECIPES, "backbone": BACKBONES,
          "head": HEADS, "optimizer": OPTIMIZERS}


def is_option(config, key):
    """Whether "section.argument" is one that the constructor named in the section takes; the recipe may leave it out."""
    section, _, argument = key.partition(".")
    table = TABLES.get(section, {})
    name = config.get(section, {}).get("name") if table else None
    return name in table and argument in inspect.signature(table[name]).parameters


def view_recipe(config):
    return construct(RECIPES, config.views, "views")


def evaluation_recipe(size, source, **options):
    """The view "image" that features are taken from; images that are no larger than it are taken whole.

    `options` are further arguments of the recipe.
    """
    whole = {"shorter_side": size} if source.image_shape and max(source.image_shape[:2]) <= size else {}
    return construct(RECIPES, {"name": "eval", "size": size, **whole, **options}, "views")


def normalizer(recipe):
    """uint8 images -> what the encoder takes, of the compute dtype of the Keras policy."""
    dtype = keras.mixed_precision.global_policy().compute_dtype
    return functools.partial(recipe.normalize, dtype=dtype)


def image_mixture(config):
    """The mixture of a config that is a stage of the pipeline; None: there is none, or it is the method's."""
    if config.mixture.name in ("none", "unmix"):
        return None
    return construct({**MIXTURES, "unmix": None, "none": None}, config.mixture, "mixture")


def normalized_in_input(config):
    """Whether views leave the pipeline normalised, as an image mixture needs them; otherwise the step normalises."""
    if config.data.normalize not in NORMALIZE:
        raise UsageError(f"data.normalize must be one of {', '.join(NORMALIZE)}. Received: {config.data.normalize!r}.")
    return config.data.normalize == "input" or image_mixture(config) is not None


def input_recipe(config, recipe):
    """The recipe of the pipeline, of a config whose views are those of `recipe`: of levels, of normalised views, or of
    crops.

    Raises:
        UsageError: views that cannot be drawn so.
    """
    if not config.data.device_views:
        return recipe.normalized() if normalized_in_input(config) else recipe
    if normalized_in_input(config):
        raise UsageError("data.device_views hands out crops, and the pipeline cannot normalise or mix those. Received: "
                         f"data.normalize {config.data.normalize}, mixture {config.mixture.name}. Leave one of them out.")
    return recipe.crops()


def set_precision(precision):
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}. Received: {precision!r}.")
    keras.backend.set_floatx("float64" if precision == "float64" else "float32")
    keras.mixed_precision.set_global_policy(PRECISIONS[precision])


def build_encoder(config):
    """The query encoder of a config: images (N, S, S, channels) -> embeddings (N, C), or (N, V * C) of V branches."""
    size, group, branches = config.views.get("size", 224), config.bn_group_size or None, config.branches

    def backbone(channels):
        return construct(BACKBONES, config.backbone, "backbone", size=size, bn_group_size=group, channels=channels)

    def head(features):
        return construct(HEADS, config.head, "head", dict(bn_group_size=group), features=features)

    if not branches:
        return encoder(backbone(config.data.channels), head)
    several = branched_backbone(branches, backbone, size)
    if several.input_shape[-1] != config.data.channels:
        raise UsageError("The channels of the branches must add up to data.channels. Received: "
                         f"{tuple(map(tuple, branches))} and data.channels {config.data.channels}.")
    return encoder(several, lambda features: branched_head(branches, head, features))


def build_method(config, steps_per_epoch, normalize_views=None):
    """The compiled method of a config, every variable made; call it under the strategy's scope."""
    keras.utils.set_random_seed(config.seed)
    offered = dict(dim=config.head.dim, shuffle_bn=config.shuffle_bn, bn_group_size=config.bn_group_size,
                   seed=config.seed, total_steps=config.epochs * steps_per_epoch)
    if "predictor" in config:
        offered["predictor"] = predictor(dim=config.head.dim, bn_group_size=config.bn_group_size or None,
                                         **config.predictor)
    methods = dict(METHODS)
    if config.mixture.name == "unmix" and config.method.name in methods:
        methods[config.method.name] = construct({"unmix": unmixed}, config.mixture, "mixture", dict(seed=config.seed),
                                                method=METHODS[config.method.name])
    method = construct(methods, config.method, "method", offered, encoder=build_encoder(config),
                       finish=view_recipe(config).finish_batch if config.data.device_views else None,
                       **step_options(config, normalize_views))
    return compile_method(method, config, steps_per_epoch)


def step_options(config, normalize_views):
    """What a config says of the training step, as arguments of `Method`."""
    return dict(normalize=normalize_views, clip_norm=config.optimizer.clip_norm,
                loss_scaling=config.precision == "float16")


def compile_method(method, config, steps_per_epoch):
    """Gives the method its optimizer, and makes the optimizer's variables; returns the method."""
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
    train, held_out = _open_splits(config.data)
    return (sources.fraction_of(train, config.data.fraction) if config.data.fraction != 1.0 else train), held_out


def _open_splits(data):
    common = dict(name=data.name, path=data.path, data_dir=data.data_dir)
    others = {key: data[key] for key in ("classes", "feature", "download") if data[key]}
    others.update({"channels": data.channels} if data.channels != 3 else {})
    train = sources.open_source(split=data.split, **common, **others)
    if data.eval_split or sources.has_split(split="val", **common):
        return train, sources.open_source(split=data.eval_split or "val", **common, **others)
    if train.random_access and data.holdout > 0:
        return sources.split_holdout(train, data.holdout)
    return train, None


def check(config, size, replicas, view_names):
    """Raises UsageError for settings that cannot work together with `size` training images and so many replicas."""
    drawn = view_recipe(config).views
    if set(view_names) != set(drawn):
        raise UsageError(f"The views must be those the method takes: {', '.join(view_names)}. Received: views "
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
    if config.bn_group_size < -1:
        raise UsageError("bn_group_size is a number of images, 0 for a replica's whole batch, or -1 for the batches of all "
                         f"replicas together. Received: {config.bn_group_size}.")
    here, group = batch // replicas, bn_group(config, replicas)
    if config.bn_group_size > 0 and here % group:
        raise UsageError(f"bn_group_size must divide the batch of a replica. Received: bn_group_size {group}, "
                         f"batch_size {batch} over {replicas} replica(s) = {here}. It may be any divisor of {here}.")
    if "method" in config and config.method.get("queue_size", 2 * batch) < batch * (1 + config.method.get("symmetric", 0)):
        raise UsageError("The queue must hold the keys of at least one step, or it would overwrite some that it has just "
                         f"written. Received: method.queue_size {config.method.queue_size}, batch_size {batch}"
                         f"{', each image with two keys' if config.method.get('symmetric') else ''}. Raise "
                         "method.queue_size or lower batch_size.")
    for key in ("bank_size", "num_images"):    # a memory bank's rows, and n of NCE
        count = config.method.get(key, 0) if "method" in config else 0
        if count not in (0, size):
            raise UsageError(f"method.{key} is the number of training images. Received: {count}, and {size} training "
                             "images. A new run takes 0, for as many as there are; one that goes on, or was imported, needs "
                             "those its bank has rows for. Its encoder suits knn, linear, finetune and export as it is.")
    if "head" in config and config.head.get("dim", 1) < 1:
        raise UsageError(f"head.dim must be at least 1. Received: {config.head.dim}.")
    if config.shuffle_bn not in ("input", "cross_replica", "none"):
        raise UsageError(f"shuffle_bn must be input, cross_replica or none. Received: {config.shuffle_bn!r}.")
    if config.epochs < 1:
        raise UsageError(f"epochs must be at least 1. Received: {config.epochs}.")


def bn_group(config, replicas):
    """How many images share batch statistics."""
    group = config.bn_group_size
    return config.batch_size if group < 0 else group or config.batch_size // replicas


# ---------------------------------------------------------------------------------------------- the workdir

def open_workdir(config, workdir, images=0, encoder=""):
    """Makes the workdir and writes config.json; or, where a run has begun in it, checks that it is the same one.

    A run has begun with its first checkpoint after step 0, which is where imported weights stand. Of several hosts only
    the chief calls this.

    Args:
        images: the number of training images; 0: not known.
        encoder: the fingerprint of the encoder that the run starts from, of one that starts from any.

    Raises:
        UsageError: the workdir cannot be written; it holds a run of another config (the message lists the keys), or one
            that began with other weights.
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
                before = json.load(file)
            if before["images"] != images:
                raise DataError(f"A run goes on with the images it was begun with. Received: {images} of them, "
                                f"{before['images']} before, in {workdir}. Restore the data, or start in another --workdir.")
            if before.get("encoder", "") != encoder:
                raise UsageError(f"A run goes on from the encoder it was begun with. Received: {config.encoder}, whose weights "
                                 f"have changed since {workdir} was begun. Start in another --workdir.")
        else:
            tf.io.gfile.makedirs(f"{workdir}/checkpoints")
            write_file(path, configs.to_json(config))
            write_file(facts, json.dumps({"images": images, **({"encoder": encoder} if encoder else {})}) + "\n")
        write_file(f"{workdir}/.writable", "")
        tf.io.gfile.remove(f"{workdir}/.writable")
    except (tf.errors.OpError, OSError) as error:
        raise UsageError(f"--workdir must be a folder that can be written. Received: {workdir}: "
                         f"{str(getattr(error, 'message', error)).splitlines()[0]}.") from None


def is_run(path):
    """Whether a folder is the workdir of a run, begun or not."""
    return tf.io.gfile.exists(f"{path}/config.json")


def read_config(workdir):
    """The config of a run.

    Raises:
        UsageError: no run is there, or its config cannot be read.
    """
    path = f"{workdir}/config.json"
    if not is_run(workdir):
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
    if config.method.name not in METHODS:
        raise UsageError(f"The workdir must be of a pre-training. Received: {workdir}, of {config.method.name}. Give the "
                         f"encoder that it started from: {config.get('encoder', 'unknown')}.")
    set_precision(config.precision)
    # By which weights negatives were drawn, is of no matter without training, and their file may be elsewhere.
    needed = configs.override(config, **{"method.weights": ""}) if config.method.get("weights") else config
    method = build_method(needed, steps_per_epoch=1, normalize_views=normalizer(view_recipe(config)))
    step = Checkpoints(method, f"{workdir}/checkpoints").restore()
    if step is None:
        raise UsageError(f"The run must have saved a checkpoint. Received: {workdir}, without one. "
                         "`moco-tf pretrain` with this workdir goes on.")
    return method, config, step


# ---------------------------------------------------------------------------------------------- training

@dataclasses.dataclass
class Outcome:
    """What `fit` has to tell: the trained method, and how long this start took."""

    method: tf.Module
    steps: int
    steps_per_epoch: int
    seconds: float
    images_per_s: float
    trained_steps: int


def fit(config, workdir, strategy, train, recipe, build, monitor_of, lines=(), view_names=("image",),
        steps_per_epoch=0, encoder="", drawn=None, data_service="", **batch_options):
    """Trains a method in a workdir to its last step; a workdir that holds the same run is resumed.

    Args:
        config: complete; what the run is.
        workdir: a folder, local or gs://.
        strategy: of `tf.distribute`.
        train: the source to train on.
        recipe: of its views.
        build: steps per epoch -> the compiled, built method; called under the strategy's scope.
        monitor_of: (method, `Unreadable` of `train`) -> (measure, titles, steps between, whether at step 0 too), as
            `Monitor` takes the first two; or None.
        lines: what is told before the run starts.
        view_names: that the method takes.
        steps_per_epoch: 0: as many whole batches as there are.
        encoder: as of `open_workdir`.
        drawn: the recipe of what the pipeline hands out, as of `input_recipe`; None: `recipe`.
        data_service: "grpc://HOST:PORT" of a tf.data service that makes the views.
        batch_options: further arguments of `training_batches`.

    Returns:
        An Outcome.

    Raises:
        UsageError, DataError, DivergedError, Preempted: as their docstrings say; the workdir keeps what was saved.
        tf.errors.OpError: one of LOST, on several hosts, when another one is gone.
    """
    replicas, hosts = strategy.num_replicas_in_sync, Hosts(strategy)
    if config.jit_compile and not tf.config.list_physical_devices("GPU"):
        logging.warning("jit_compile on a CPU makes the step many times slower: XLA's convolutions are slow there")
    check(config, train.size, replicas, view_names)
    if not train.portable and (data_service or hosts.remote_input):
        raise UsageError("A data service, or the hosts of a TPU slice, read files of images or records. Received: the data "
                         f"source {config.data.name}, which this process alone can read.")
    _check_alike(hosts, {"config": int(configs.digest(config), 16), "number of training images": train.size})
    steps_per_epoch = steps_per_epoch or train.size // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    with strategy.scope():
        method = build(steps_per_epoch)
        if hosts.chief:
            open_workdir(config, workdir, train.size, encoder)
        hosts.sum(0)    # before the others look for checkpoints
        checkpoints = Checkpoints(method, f"{workdir}/checkpoints", config.checkpoint.keep, hosts)
        first_step = checkpoints.restore() or 0
    _check_alike(hosts, {"newest checkpoint": first_step})
    if hosts.chief:
        keep_lines(f"{workdir}/monitor.jsonl", lambda record: 0 < first_step >= record["step"])
    clock = None if hosts.remote_input else BatchClock()
    writer = tf.summary.create_file_writer(f"{workdir}/tensorboard") if config.log.tensorboard and hosts.chief else None
    resuming = [f"resuming at step {first_step} of {total_steps}"] if first_step else []
    print("\n".join([*lines, *resuming]), flush=True)
    unreadable = (UnreadableElsewhere if hosts.remote_input else Unreadable)(train, config.data.max_unreadable)
    start = hosts.sum(time.time_ns() if hosts.chief else 0)    # tells this start of the run from all others
    service = DataService(data_service, f"moco_tf-{start}") if data_service else None
    draw = functools.partial(
        training_batches, train, batch_size=config.batch_size, steps_per_epoch=steps_per_epoch, seed=config.seed,
        first_step=first_step, bn_group_size=bn_group(config, replicas), workers=config.data.workers,
        unreadable=unreadable, **batch_options)

    def batches(context):
        return draw(recipe=drawn or recipe, context=context, clock=clock, service=service,
                    replicas=replicas // context.num_input_pipelines)

    log = Log(first_step, total_steps, steps_per_epoch, config.batch_size, config.log.every_steps,
              f"{workdir}/metrics.jsonl" if hosts.chief else None, writer, clock,
              method.chance_loss(config.batch_size), build_schedule(config, steps_per_epoch))
    stop = StopOnSignal(first_step, checkpoints, hosts)
    after = [StopWhenDiverged(first_step, config.max_bad_steps, checkpoints)]
    # The chief alone measures; the others' next step waits for it.
    monitor, followed = None, monitor_of(method, unreadable) if hosts.chief else None
    began = time.time()
    try:
        with stop:
            if followed:
                measure, titles, every, at_start = followed
                monitor = Monitor(measure, titles, f"{workdir}/monitor.jsonl", writer, log.line)
                if at_start and first_step == 0:
                    monitor(first_step)
                after.append(Every(first_step, every, monitor, log))
            after += [Every(first_step, config.checkpoint.every_steps, checkpoints.save, log), stop]
            if first_step < total_steps:
                dataset = strategy.distribute_datasets_from_function(batches)
                if first_step == 0 and hosts.chief:
                    _show_views(draw(recipe=recipe, shuffle=False), recipe, workdir, writer)
                method.fit(dataset, steps_per_epoch=total_steps - first_step, epochs=1, verbose=0,
                           callbacks=[log, *after])
                if step_of(checkpoints.good) != total_steps:
                    checkpoints.save(total_steps)
            if monitor:
                monitor(total_steps)
            hosts.sum(0)    # or the last measurement would go on without hosts that have ended
    except tf.errors.ResourceExhaustedError as error:
        raise UsageError("A step must fit into the device's memory. Received: "
                         f"{_first_line_of(error)}. Lower batch_size or views.size, or use precision=bfloat16.") from None
    except tf.errors.OpError as error:
        if hosts.others and isinstance(error, LOST) and not unreadable.over_limit():
            raise
        raise unreadable.over_limit() or DataError(
            f"The input or the workdir failed while training: {_first_line_of(error)}. `moco-tf data check` looks at the "
            "images.") from None
    return Outcome(method, total_steps, steps_per_epoch, time.time() - began, log.images_per_s(), log.trained_steps)


def pretrain(config, workdir, strategy=None, reason="", data_service=""):
    """Pre-trains the encoder of a config in `workdir`; a workdir that holds the same run is resumed.

    Args:
        config: complete, as from `moco_tf.config.load`.
        workdir: a folder, local or gs://, that holds everything of the run.
        strategy: of `tf.distribute`; None: the current one.
        reason: why this strategy, for the log.
        data_service: as of `fit`.

    Returns:
        The contents of results.json.

    Raises:
        UsageError, DataError, DivergedError, Preempted: as their docstrings say; the workdir keeps what was saved.
        MocoError: another host is gone, and nothing was saved.
    """
    strategy = strategy or tf.distribute.get_strategy()
    with _all_hosts_there(strategy, workdir):
        return _pretrain(config, workdir, strategy, reason, data_service)


@contextlib.contextmanager
def _all_hosts_there(strategy, workdir):
    """Ends the run on this host in order when another one has ended before.

    Raises:
        Preempted: there is a checkpoint to go on from.
        MocoError: there is none.
    """
    try:
        yield
    except LOST as error:
        if not Hosts(strategy).others:
            raise
        saved = saved_checkpoints(f"{workdir}/checkpoints")
        cause, *_ = str(error.message).rpartition("aborted by: ")[2].split("\n")
        raise (Preempted if saved else MocoError)(
            f"another host is gone, and its own output says why: {cause.rstrip('.')}. The last checkpoint is "
            f"{saved[-1] if saved else 'none'}. Start the same command again on all hosts.") from None


def _pretrain(config, workdir, strategy, reason, data_service):
    set_precision(config.precision)
    train, held_out = open_data(config)
    for count in ("bank_size", "num_images"):
        if config.method.get(count) == 0:
            config = configs.override(config, **{f"method.{count}": train.size})
    recipe = view_recipe(config)
    measures = []

    def monitor_of(method, unreadable):
        if held_out is None:
            return None
        measures.append(PretrainingMeasures(
            config.monitor, train, held_out, recipe, evaluation_recipe(config.views.size, train),
            Extractor(method.encoder, method.normalize), FEATURES.index(config.monitor.features), config.batch_size,
            config.data.workers, config.seed, unreadable, branches=max(1, len(config.branches))))
        every = config.monitor.every_epochs * (train.size // config.batch_size)
        return measures[0], {"knn_top1": "kNN accuracy", "view_retrieval": "view retrieval"}, every, True

    outcome = fit(config, workdir, strategy, train, recipe,
                  build=lambda steps_per_epoch: build_method(config, steps_per_epoch, normalizer(recipe)),
                  monitor_of=monitor_of,
                  lines=_announcement(config, train, held_out, strategy, reason),
                  view_names=view_names(config), shuffle=config.shuffle_bn == "input", repeats=config.data.repeats,
                  mixture=image_mixture(config), drawn=input_recipe(config, recipe), data_service=data_service)
    if measures and config.log.embeddings:
        write_projector(workdir, *measures[0].whole_images(measures[0].queries))
    return write_results(config, workdir, outcome, train, strategy.num_replicas_in_sync,
                         ("knn_top1", "view_retrieval"), chief=Hosts(strategy).chief)


def _check_alike(hosts, facts):
    """Raises UsageError on all hosts unless `facts`, {name: integer}, are the same on all of them."""
    for name, column in zip(facts, hosts.gather(list(facts.values())).T):
        if len(set(column.tolist())) > 1:
            raise UsageError("All hosts must be given the same command, and see the same data and workdir. Received: "
                             f"not the same {name}, but {', '.join(map(str, column))}.")


def view_names(config):
    """Of the views that the config's method takes; () where there is no such method."""
    return getattr(METHODS.get(config.method.name), "view_names", ())


def _first_line_of(error):
    """Of a TensorFlow error, without the names of graph nodes and an assertion's brackets."""
    line = str(error.message).splitlines()[0] if error.message else type(error).__name__
    line = re.sub(r"\{\{.*?\}\}", "", line).strip()
    _, _, asserted = line.partition("assertion failed: ")
    return re.sub(r"[\[\]]", "", asserted).strip() or line


def _announcement(config, train, held_out, strategy, reason):
    """What is about to run, and what is odd about it; lines."""
    replicas, hosts = strategy.num_replicas_in_sync, Hosts(strategy).count
    group, steps_per_epoch = bn_group(config, replicas), train.size // config.batch_size
    lines = [*data_lines(config, train, held_out, steps_per_epoch),
             f"{replicas} replica(s){f', {reason}' if reason else ''}; BatchNorm over groups of "
             f"{group} images, shuffling BN: {config.shuffle_bn}"]
    queue = config.method.get("queue_size", 0)
    if queue:
        full = math.ceil(queue / config.batch_size / (1 + config.method.get("symmetric", 0)))
        lines.append(f"queue of {queue} keys, first full of real ones at step {full}; the loss rises until then")
        if queue > train.size:
            lines.append(f"note: the queue spans {queue / train.size:.1f} epochs, so that a query meets old keys of its "
                         f"own image as negatives; a method.queue_size below {train.size} is usual.")
    if config.shuffle_bn == "input" and config.batch_size // hosts <= group < config.batch_size:
        lines.append("note: shuffling BN in the input has no effect with one BatchNorm group on each host; "
                     "shuffle_bn=cross_replica shuffles between the hosts.")
    if config.shuffle_bn != "none" and group >= config.batch_size:
        lines.append("note: shuffling BN has no effect with one BatchNorm group for the whole batch; "
                     f"bn_group_size={max(2, config.batch_size // 8)} would have several.")
    return lines


def data_lines(config, train, held_out, steps_per_epoch):
    """What a run trains on, how long, and its learning rate."""
    return [f"{train.size} images{f' in {train.num_classes} classes' if train.num_classes else ', no labels'}, "
            f"{held_out.size if held_out else 'no'} held out; {config.epochs} epochs of {steps_per_epoch} steps of "
            f"{config.batch_size} images; learning rate {learning_rate(config):.4g} "
            f"({config.optimizer.lr_per_256:.4g} per 256); {config.precision}", *_view_lines(config, train)]


def _view_lines(config, train):
    """What is odd about the views; lines."""
    lines, mixture, space = [], image_mixture(config), view_recipe(config).space
    if mixture and partners_of(mixture, train) != mixture.partners:
        lines.append(f"note: {config.data.name} data are read as a stream, so that images are mixed with others of the "
                     "same batch, and not with any.")
    if space:
        share = sources.grey_share(train)
        if share > 1 / 3:
            lines.append(f"note: {share:.0%} of a sample of the training images are grey, so that their chroma in {space} is "
                         "the same everywhere: that view of them holds little, and neither finds the other.")
    return lines


def _show_views(dataset, recipe, workdir, writer, count=8):
    """The first images' views, as a picture in the workdir and in TensorBoard: a row for each view. Levels, before a
    colour space and normalisation; image mixtures are shown as they mix levels. Of more than 3 channels the first 3."""
    batch = next(iter(dataset))
    rows = [np.concatenate(list(batch[name][:count].numpy()), axis=1) for name in recipe.views]
    rows = [row[..., :3] if row.shape[-1] >= 3 else row[..., :1] for row in rows]
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


def write_results(config, workdir, outcome, train, replicas, monitored, chief=True, **others):
    """Writes results.json, if this is the chief of the hosts; returns its contents.

    Args:
        monitored: values of monitor.jsonl of which the first and the last are results.
        others: further results.
    """
    path = f"{workdir}/results.json"
    results = {"steps": outcome.steps, "seconds": round(outcome.seconds, 2), "images_per_s": round(outcome.images_per_s, 2)}
    if outcome.trained_steps == 0 and tf.io.gfile.exists(path):    # a finished run, looked at again
        with tf.io.gfile.GFile(path) as file:
            results.update({key: value for key, value in json.load(file).items() if key in results})
    lines = read_lines(f"{workdir}/monitor.jsonl")
    for name in monitored:
        measured = [record[name] for record in lines if name in record]
        results[f"{name}_initial"] = measured[0] if measured else None
        results[f"{name}_final"] = measured[-1] if measured else None
    metrics = read_lines(f"{workdir}/metrics.jsonl")
    results.update(loss_final=metrics[-1]["loss"] if metrics else None, **others, seed=config.seed, images=train.size,
                   replicas=replicas, config_hash=configs.digest(config), versions=versions())
    if chief:
        write_file(path, json.dumps(results, indent=2) + "\n")
    return results


def versions():
    """Of what computes."""
    return {"python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("tensorflow", "numpy")},
            "moco_tf": __version__}
