"""Labels from an encoder: a linear classifier on frozen features (linear probe), or the whole network (fine-tuning)."""

import functools
import math

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from moco_tf import config as configs
from moco_tf.callbacks import read_lines
from moco_tf.data.pipeline import Unreadable, evaluation_batches
from moco_tf.errors import MocoError, UsageError
from moco_tf.evaluation.encoders import open_encoder, read_own_config
from moco_tf.evaluation.layers import at_layer
from moco_tf.evaluation.metrics import summary
from moco_tf.evaluation.splits import check_labels, labelled_splits
from moco_tf.losses import at_least_float32
from moco_tf.methods.base import Method
from moco_tf.momentum import momentum_copy, momentum_update
from moco_tf.normalization import BatchNorm
from moco_tf.train import (compile_method, construct, data_lines, evaluation_recipe, fit, set_precision,
                           step_options, view_recipe, write_results)
from moco_tf.views.mixture import mixture, random_erasing

keras = tf.keras

BAR_AFTER = 3.0    # seconds of a validation pass until its progress is shown


class Classifier(Method):
    """A linear layer on the features of a backbone. Its keys are the classes: each has a row that features are
    compared with, so the loss is cross-entropy over them.

    Views: "image" (N, S, S, channels); with them "label" (N,) and "weight" (N,), as `training_batches` hands out.

    Args:
        backbone: images -> (N, D).
        num_classes: C.
        stddev: of the layer's initial weights, normal; its biases start at 0.
        seed: of these weights, and of what else is drawn.
    """

    view_names = ("image",)

    def __init__(self, backbone, num_classes, stddev=0.01, seed=0, **kwargs):
        super().__init__(backbone, **kwargs)
        self.seed = seed
        initial = keras.initializers.RandomNormal(stddev=stddev, seed=seed)
        dtype = "float64" if keras.backend.floatx() == "float64" else "float32"
        self.classifier = keras.layers.Dense(num_classes, kernel_initializer=initial, dtype=dtype, name="classifier")

    def build_on(self, width):
        """Makes the classifier's variables, for features of this width."""
        self.classifier.build((None, width))

    def features(self, images, training):
        return at_least_float32(self.encoder(images, training=training))

    def logits(self, images):
        """uint8 images -> (N, C), in inference mode."""
        return self.classify(self.features(self.normalize(images), training=False), training=False)

    def classify(self, features, training):
        return self.classifier(features)

    def metrics_of(self, keys, outputs):
        return {"accuracy": tf.reduce_mean(tf.cast(_among_highest(outputs, 1), tf.float32) * outputs["weight"]),
                "accuracy_top5": tf.reduce_mean(tf.cast(_among_highest(outputs, 5), tf.float32) * outputs["weight"])}

    def chance_loss(self, batch_size):
        return math.log(self.classifier.units)

    def kept(self):
        """{name: what a checkpoint of the best classifier holds}."""
        return {"classifier": self.classifier}


class LinearProbe(Classifier):
    """The linear classification protocol: the backbone is frozen and in inference mode, its moving statistics too
    (MoCo v1, sec. 4.1).

    Args:
        batch_norm: normalise the features by a BatchNorm without parameters before the classifier.
    """

    def __init__(self, backbone, num_classes, batch_norm=False, **kwargs):
        super().__init__(backbone, num_classes, **kwargs)
        self.encoder.trainable = False
        self.batch_norm = BatchNorm(center=False, scale=False, name="bn") if batch_norm else None

    def build_on(self, width):
        super().build_on(width)
        if self.batch_norm:
            self.batch_norm.build((None, width))

    def encode_keys(self, views):
        return {"features": tf.stop_gradient(self.features(views["image"], training=False))}

    def contrastive_loss(self, views, keys):
        logits = self.classify(keys["features"], training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(views["label"], logits)
        weight = tf.cast(views["weight"], losses.dtype)
        return losses * weight, {"logits": logits, "label": views["label"], "weight": views["weight"]}

    def classify(self, features, training):
        if self.batch_norm:
            features = self.batch_norm(features, training=training)
        return super().classify(features, training)

    def kept(self):
        return {**super().kept(), **({"bn": self.batch_norm} if self.batch_norm else {})}


class FineTuning(Classifier):
    """Every weight trains, from the encoder's.

    Args:
        stddev: as of `Classifier`.
        mixup, cutmix: parameters of the Beta distributions; 0 for none of it.
        smoothing: of labels.
        erasing: probability that a box of an image becomes noise.
        average: > 0 keeps a moving average of the weights with this momentum, and saves it; accuracies are those of the
            weights themselves (DeiT, arXiv:2012.12877).
    """

    def __init__(self, backbone, num_classes, stddev=0.01, mixup=0.0, cutmix=0.0, smoothing=0.0, erasing=0.0, average=0.0,
                 **kwargs):
        super().__init__(backbone, num_classes, stddev, **kwargs)
        self.encoder.trainable = True    # a momentum encoder's copy and a frozen patch convolution too
        self.mix = functools.partial(mixture, num_classes=num_classes, mixup=mixup, cutmix=cutmix, smoothing=smoothing)
        self.erasing, self.average = erasing, average

    def build_on(self, width):
        super().build_on(width)
        if self.average:
            self.network = keras.Model(self.encoder.input, self.classifier(self.encoder.output), name="network")
            self.averaged = momentum_copy(self.network)

    def encode_keys(self, views):
        return {}

    def contrastive_loss(self, views, keys):
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = tf.stack([tf.cast(self.seed, tf.int32), tf.cast(self.optimizer.iterations, tf.int32)])
        erase_seed, mix_seed = tf.unstack(tf.random.split(tf.random.fold_in(seed, replica), 2, alg="philox"))
        images = views["image"]
        if self.erasing:
            images = random_erasing(images, erase_seed, self.erasing)
        images, targets = self.mix(images, views["label"], mix_seed)
        logits = self.classify(self.features(images, training=True), training=True)
        losses = tf.nn.softmax_cross_entropy_with_logits(tf.cast(targets, logits.dtype), logits)
        weight = tf.cast(views["weight"], losses.dtype)
        return losses * weight, {"logits": logits, "label": views["label"], "weight": views["weight"]}

    def update_memory(self, keys, outputs, write):
        if self.average:
            momentum_update(self.averaged, self.network, tf.where(write, self.average, 1.0), buffers=True)

    def kept(self):
        return {**super().kept(), "backbone": self.encoder, **({"averaged": self.averaged} if self.average else {})}


CLASSIFIERS = {"linear_probe": LinearProbe, "fine_tuning": FineTuning}


def _among_highest(outputs, k):
    own = tf.gather(outputs["logits"], outputs["label"], batch_dims=1)[:, None]
    return tf.math.count_nonzero(outputs["logits"] > own, axis=1) < k


class Validation:
    """Accuracy on held-out images; keeps the best classifier so far in `folder`.

    Args:
        method: a Classifier.
        strategy: that it was made under.
        batches: of `evaluation_batches` of one pass, of a size that the replicas can share.
        folder: where the best one's weights go.
        source: of the images.
        past: the top-1 accuracies measured before, of a run that goes on.
    """

    def __init__(self, method, strategy, batches, folder, source, past=()):
        self.strategy, self.batches, self.source, self.best = strategy, batches, source, max(past, default=-1.0)
        self.last = None    # the newest `summary`
        self.run = tf.function(lambda images: strategy.run(method.logits, args=(images,)))
        self.manager = tf.train.CheckpointManager(tf.train.Checkpoint(**method.kept()), folder, max_to_keep=1,
                                                  checkpoint_name="best")

    def measure(self):
        """As `moco_tf.evaluation.metrics.summary` of the logits; DataError for a label outside the range."""
        logits, labels, indexes = [], [], []
        shown = tqdm(self.batches, desc="validation", unit="batch", leave=False, delay=BAR_AFTER)
        for views, label, index, real in shown:
            real = real.numpy()
            logits.append(self.logits(views["image"])[real])
            labels.append(label.numpy()[real])
            indexes.append(index.numpy()[real])
        labels, indexes = np.concatenate(labels), np.concatenate(indexes)
        check_labels(labels, self.source.num_classes, lambda row: self.source.describe(indexes[row]))
        self.last = summary(np.concatenate(logits), labels)
        return self.last

    def logits(self, images):
        """uint8 images (N, S, S, channels) -> (N, C), NumPy; each replica takes its part of the rows."""
        parts = tf.split(images, self.strategy.num_replicas_in_sync)
        dealt = self.strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group])
        return np.concatenate([part.numpy() for part in self.strategy.experimental_local_results(self.run(dealt))])

    def __call__(self):
        """{"top1", "top5"} in [0, 1]."""
        measured = self.measure()
        values = {name: measured[name] for name in ("top1", "top5")}
        if values["top1"] > self.best:
            self.best = values["top1"]
            self.manager.save()
        return values


def complete_config(config):
    """A probe's or fine-tuning's config with what it leaves to the encoder filled in: its data, its image size.

    Raises:
        UsageError: no encoder is named, or one without data of its own while the config names none.
    """
    if not config.encoder:
        raise UsageError("An encoder is needed: a run's workdir, a file of weights, or a SavedModel. Give --encoder=PATH.")
    own = read_own_config(config.encoder)
    config = config.copy_and_resolve_references().unlock()
    if not config.data.name:
        if own is None:
            raise UsageError(f"The data must be named where the encoder has none of its own. Received: {config.encoder}. "
                             "Give --config.data.name=folder --config.data.path=...")
        defaults, given = configs.RUN_DEFAULTS["data"], config.data
        config.data = own.data.copy_and_resolve_references().unlock()
        config.data.update({key: value for key, value in given.items() if key != "name" and value != defaults[key]})
    if not config.views.size and own is not None:
        config.views.size = own.views.size
    return config.lock()


def train_classifier(config, workdir, strategy=None, reason=""):
    """Trains a linear probe or fine-tunes, as the config's method says; a workdir that holds the same run is resumed.

    Args:
        config: complete, as from `complete_config`.
        workdir: a folder, local or gs://, for everything of the run.
        strategy: of `tf.distribute`; None: the current one.
        reason: why this strategy, for the log.

    Returns:
        The contents of results.json: best and last accuracies, confusion matrix, accuracy per class, and for a probe
        that the backbone is unchanged, bit for bit.

    Raises:
        UsageError, DataError, DivergedError, Preempted: as `fit`; DataError also for images without labels.
    """
    strategy = strategy or tf.distribute.get_strategy()
    set_precision(config.precision)
    _require_trainable(config, strategy.num_replicas_in_sync)
    train, held_out = labelled_splits(config)
    with strategy.scope():
        encoder = open_encoder(config.encoder, config.side, config.views.size, config.precision, config.bn_group_size,
                               config.seed, **config.get("backbone", {}))
        if "layer" in config:
            encoder = at_layer(encoder, config.layer, **config.get("pool", {}))
    set_precision(config.precision)    # of a SavedModel, which does not follow it, the classifier's
    if not config.views.size:
        config = configs.override(config, **{"views.size": encoder.size})
    recipe, frozen = view_recipe(config), config.method.name == "linear_probe"
    batches = evaluation_batches(held_out, evaluation_recipe(encoder.size, held_out, **config.get("evaluation", {})),
                                 config.batch_size, workers=config.data.workers,
                                 unreadable=Unreadable(held_out, config.data.max_unreadable))
    steps_per_epoch = -(-train.size // config.batch_size) if frozen else 0
    before = encoder.fingerprint()
    validations = []

    def build(steps_per_epoch):
        keras.utils.set_random_seed(config.seed)
        method = construct(CLASSIFIERS, config.method, "method", backbone=encoder.models["backbone"],
                           num_classes=train.num_classes, seed=config.seed, **step_options(config, encoder.normalize))
        method.build_on(encoder.width)
        return compile_method(method, config, steps_per_epoch)

    def monitor_of(method, _):
        past = [line["top1"] for line in read_lines(f"{workdir}/monitor.jsonl") if "top1" in line]
        validations.append(Validation(method, strategy, batches, f"{workdir}/best", held_out, past))
        every = config.monitor.every_epochs * (steps_per_epoch or train.size // config.batch_size)
        return validations[0], {"top1": "top-1", "top5": "top-5"}, every, False

    outcome = fit(config, workdir, strategy, train, recipe, build, monitor_of,
                  lines=[f"encoder: {encoder.description}, features of {encoder.width} values",
                         *data_lines(config, train, held_out, steps_per_epoch or train.size // config.batch_size),
                         f"{strategy.num_replicas_in_sync} replica(s){f', {reason}' if reason else ''}"],
                  steps_per_epoch=steps_per_epoch, encoder=before, labels=True, repeats=config.data.repeats)
    facts = {"backbone_unchanged": encoder.fingerprint() == before} if frozen else {}
    last = validations[0].last or validations[0].measure()
    best = max((line for line in read_lines(f"{workdir}/monitor.jsonl")), key=lambda line: line["top1"])
    results = write_results(config, workdir, outcome, train, strategy.num_replicas_in_sync, (), **last,
                            best_top1=best["top1"], best_top5=best["top5"], best_step=best["step"],
                            class_names=list(train.class_names), encoder=config.encoder, **facts)
    if not facts.get("backbone_unchanged", True):
        raise MocoError(f"The frozen backbone must stay as it was, bit for bit. It changed while {workdir} was trained; "
                        "its figures are not a linear probe's.")
    return results


def _require_trainable(config, replicas):
    """Raises UsageError for what a classifier cannot be trained with."""
    if config.data.device_views:
        raise UsageError("data.device_views is for pre-training; a classifier takes whole views. Received: True. Leave it out.")
    mixed = [name for name in ("mixup", "cutmix") if config.method.get(name, 0)]
    if mixed and config.batch_size // replicas % 2:
        raise UsageError(f"{' and '.join(mixed)} mix a replica's images with the same in reverse order, so their number must be "
                         f"even. Received: batch_size {config.batch_size} over {replicas} replica(s). Nearest: "
                         f"{max(2, round(config.batch_size / replicas / 2) * 2) * replicas}.")
