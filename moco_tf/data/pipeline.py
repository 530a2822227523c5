"""From a source to batches: one builder to train, one to evaluate.

Everything drawn for global batch t is a function of (seed, t): which images, their views, the permutation of the keys.
So neither the number of workers, replicas or hosts, nor a resume, changes what is seen.
"""

import logging
import threading

import numpy as np
import tensorflow as tf

from moco_tf.errors import DataError
from moco_tf.shuffling import key_permutation, positions

FOREVER = tf.int64.max
CLOCK_SLOTS = 1024
SMALL = 64 * 64    # pixels of a source's images up to which a batch of them is augmented in one call


class Unreadable:
    """Counts the images that could not be read, logs each once by its path, and stops the run above a share of them."""

    def __init__(self, source, limit):
        self.source, self.limit = source, limit
        self.seen, self._lock = set(), threading.Lock()

    def report(self, indexes):
        """Called by the pipeline; raises once more than `limit` of the images were met unreadable."""
        with self._lock:
            for index in set(np.asarray(indexes).tolist()) - self.seen:
                self.seen.add(index)
                logging.warning("skipped an unreadable image: %s", self.source.describe(index))
            if len(self.seen) > self.limit * self.source.size:
                raise ValueError("too many unreadable images")

    def over_limit(self):
        """The error to end the run with, or None."""
        if len(self.seen) <= self.limit * self.source.size:
            return None
        examples = ", ".join(self.source.describe(index) for index in sorted(self.seen)[:3])
        return DataError(f"At most {self.limit:.1%} of the images may be unreadable. Met {len(self.seen)} of "
                         f"{self.source.size}, among them {examples}. `moco-tf data check` lists all; remove them or "
                         "raise data.max_unreadable.")


class BatchClock:
    """When each batch left the pipeline, in seconds since the epoch: shows how long the training step waited for it."""

    def __init__(self):
        with tf.device("/cpu:0"):
            self.times = tf.Variable(tf.zeros([CLOCK_SLOTS], tf.float64), trainable=False)

    def stamp(self, step, batch):
        """A pipeline stage: passes the batch on."""
        with tf.control_dependencies([self.times.scatter_nd_update([[step % CLOCK_SLOTS]], [tf.timestamp()])]):
            return tf.nest.map_structure(tf.identity, batch)

    def ready_at(self, step):
        return float(self.times[step % CLOCK_SLOTS].numpy())


def training_batches(source, recipe, batch_size, steps_per_epoch, seed, first_step=0, shuffle=True, bn_group_size=0,
                     replicas=1, context=None, workers=0, unreadable=None, clock=None):
    """Batches of views without end, from global step `first_step` on.

    Args:
        source: of images (moco_tf.data.sources).
        recipe: of views (moco_tf.views.recipes).
        batch_size: of all replicas of all hosts.
        steps_per_epoch: batches that make one pass; the images of an incomplete batch are left out of the pass.
        seed: of the order, the views and the permutations.
        first_step: global step of the first batch.
        shuffle: permute the keys over this host's replicas, for shuffling BN.
        bn_group_size: images that share batch statistics; 0: those of a replica.
        replicas: of this host.
        context: the `tf.distribute.InputContext` of this host; None: there is one host.
        workers: parallel calls; 0: tf.data's choice.
        unreadable: an `Unreadable` that hears of images which do not decode; None: such an image ends the run.
        clock: a `BatchClock`.

    Returns:
        A dataset of one replica's share a time, replica after replica: {"query": (N, S, S, 3) uint8, "key": the same,
        "index": (N,) int64, "key_position": (N,) int32}, further views by their names.
    """
    hosts, host = (context.num_input_pipelines, context.input_pipeline_id) if context else (1, 0)
    here = batch_size // hosts
    parallel = workers or tf.data.AUTOTUNE

    def batch_seeds(step):
        """(here, 2): one seed an image of this host's share of the global batch."""
        seeds = tf.random.stateless_uniform([batch_size, 2], seed=tf.stack([tf.cast(seed, tf.int64), step]),
                                            minval=None, maxval=None, dtype=tf.int32)
        return seeds[host * here:(host + 1) * here]

    steps = tf.data.Dataset.range(first_step, FOREVER)
    examples = _epochs(source, seed, steps_per_epoch * batch_size, first_step * batch_size)
    if hosts > 1:
        examples = examples.enumerate().filter(
            lambda position, _: position % batch_size // here == host).map(lambda _, example: example)
    guard = _guarded if unreadable else lambda function: lambda *example: (True, function(*example))
    if source.image_shape and source.image_shape[0] * source.image_shape[1] <= SMALL:
        examples = tf.data.Dataset.zip((examples,))
        of_one, of_batch = source.decode, lambda images, seeds: {"index": images["index"],
                                                                 **recipe.apply_batch(images["image"], seeds)}
    else:
        def of_one(example, image_seed):
            image = source.decode(example)
            return {"index": image["index"], **recipe.apply(image["image"], image_seed)}

        of_batch = lambda views, seeds: views
        examples = tf.data.Dataset.zip((examples, steps.map(batch_seeds, parallel).unbatch()))
    read = examples.map(lambda *example: (source.index_of(example[0]), *guard(of_one)(*example)), parallel)
    batches = tf.data.Dataset.zip((steps, read.batch(here, drop_remainder=True))).map(
        lambda step, batch: (step, of_batch(_without_unreadable(*batch, unreadable), batch_seeds(step))), parallel)
    group = bn_group_size or here // replicas

    def deal(step, batch):
        """The keys in shuffled order, and the batch as (replicas, N, ...)."""
        order = key_permutation(seed, step, here, group) if shuffle else tf.range(here)
        batch = {**batch, "key_position": host * here + positions(order)}
        if shuffle:
            batch["key"] = tf.gather(batch["key"], order)
        if clock:
            batch = clock.stamp(step, batch)
        return {name: tf.reshape(value, [replicas, here // replicas, *value.shape[1:]])
                for name, value in batch.items()}

    dealt = batches.map(deal, parallel).unbatch() if replicas > 1 else \
        batches.map(lambda step, batch: {name: value[0] for name, value in deal(step, batch).items()}, parallel)
    return dealt.prefetch(2 * replicas).with_options(_options())


def evaluation_batches(source, recipe, batch_size, limit=0, seed=0, workers=0):
    """One pass: batches of (views, label (n,), index (n,)); the last one may be smaller. Unreadable images are left out.

    Args:
        limit: > 0 takes so many images, drawn as in the first epoch of seed 0, if there are more.
        seed: of the views, if they draw anything: view by view a function of (seed, index).
    """
    parallel = workers or tf.data.AUTOTUNE

    def one(example):
        image = source.decode(example)
        image_seed = tf.random.stateless_uniform([2], seed=tf.stack([tf.cast(seed, tf.int64), image["index"]]),
                                                 minval=None, maxval=None, dtype=tf.int32)
        return recipe.apply(image["image"], image_seed), image["label"], image["index"]

    examples = source.examples(0, 0).take(limit) if 0 < limit < source.size else source.examples()
    kept = examples.map(_guarded(one), parallel).filter(lambda ok, _: ok).map(lambda _, result: result)
    return kept.batch(batch_size).prefetch(2).with_options(_options())


def _epochs(source, seed, per_epoch, first):
    """Examples without end, `per_epoch` of each epoch's order, from position `first` on."""
    first_epoch, offset = divmod(first, per_epoch)

    def one(epoch):
        done = tf.where(epoch == first_epoch, tf.constant(offset, tf.int64), tf.constant(0, tf.int64))
        return source.examples(seed, epoch, done).take(per_epoch - done)

    return tf.data.Dataset.range(first_epoch, FOREVER).flat_map(one)


def _guarded(function):
    """example -> (True, function(example)), or (False, zeros) where it fails: tf.data's errors, without losing count."""
    def guarded(*example):
        one = tf.data.Dataset.from_tensors(example).map(lambda *example: (True, function(*example)))
        nothing = tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), one.element_spec)
        failed = tf.data.Dataset.from_tensors((False, nothing[1]))
        return one.ignore_errors().concatenate(failed).take(1).get_single_element()

    return guarded


def _without_unreadable(indexes, readable, batch, unreadable):
    """Each unreadable row of a batch is replaced by the next readable one, so that batch sizes stay what they are."""
    if unreadable is None:
        return batch

    def repair():
        report = tf.numpy_function(unreadable.report, [tf.boolean_mask(indexes, tf.logical_not(readable))], [])
        size = indexes.shape[0]
        ahead = (tf.range(size)[None, :] - tf.range(size)[:, None]) % size    # how far row j lies ahead of row i
        source_row = tf.argmin(tf.where(readable[None, :], ahead, size), axis=1)
        with tf.control_dependencies([report, tf.debugging.Assert(tf.reduce_any(readable), ["no image is readable"])]):
            return {name: tf.gather(value, source_row) for name, value in batch.items()}

    return tf.cond(tf.reduce_all(readable), lambda: dict(batch), repair)


def _options():
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options
