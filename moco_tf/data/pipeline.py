"""From a source to batches: one builder to train, one to evaluate.

Everything drawn for global batch t is a function of (seed, t): which images, their views, the permutation of the keys.
So neither the number of workers, replicas or hosts, nor a resume, changes what is seen.
"""

import functools
import logging
import math
import threading

import numpy as np
import tensorflow as tf

from moco_tf.data.sources import INTERLEAVED_SHARDS, SHUFFLE_BUFFER, Records, epoch_key
from moco_tf.errors import DataError, UsageError
from moco_tf.shuffling import key_permutation, positions
from moco_tf.views import ops
from moco_tf.views.recipes import numbers_of

FOREVER = tf.int64.max
CLOCK_SLOTS = 1024
# Nothing here is for AutoGraph, which takes two thirds of the time of tracing.
as_written = tf.autograph.experimental.do_not_convert
AT_ONCE = 32       # images that one call of XLA draws or finishes, at most; a divisor of the batch, and 1 is a third slower
SMALL = 64 * 64    # pixels of a source's images up to which a batch of them is augmented in one call


class Unreadable:
    """Counts the images that could not be read, logs each once by its path, and stops the run above a share of them
    (rounded up to whole images)."""

    def __init__(self, source, limit):
        self.source, self.limit = source, limit
        self.allowed = math.ceil(limit * source.size)
        self.seen, self._lock = set(), threading.Lock()

    def report(self, indexes):
        """Called by the pipeline; raises once more than `limit` of the images were met unreadable."""
        with self._lock:
            for index in set(np.asarray(indexes).tolist()) - self.seen:
                self.seen.add(index)
                logging.warning("skipped an unreadable image: %s", self.source.describe(index))
            if len(self.seen) > self.allowed:
                raise ValueError("too many unreadable images")

    def tell(self, indexes):
        """An operation of the pipeline that reports."""
        return tf.numpy_function(self.report, [indexes], [])

    def over_limit(self):
        """The error to end the run with, or None."""
        if len(self.seen) <= self.allowed:
            return None
        examples = ", ".join(self.source.describe(index) for index in sorted(self.seen)[:3])
        return DataError(f"At most {self.limit:.1%} of the images may be unreadable. Met {len(self.seen)} of "
                         f"{self.source.size}, among them {examples}. `moco-tf data check` lists all; remove them or "
                         "raise data.max_unreadable.")


class UnreadableElsewhere(Unreadable):
    """For a pipeline that runs in another process, which writes the images' indexes into its own output: nothing counts
    them, and no limit holds."""

    def tell(self, indexes):
        return tf.print("skipped unreadable images, of index", indexes, summarize=-1)


class BatchClock:
    """When each batch left the pipeline, in seconds since the epoch: shows how long the training step waited for it."""

    def __init__(self):
        with tf.device("/cpu:0"):
            self.times = tf.Variable(tf.zeros([CLOCK_SLOTS], tf.float64), trainable=False)

    def stamp(self, step, batch):
        """A pipeline stage: passes the batch on."""
        with tf.control_dependencies(tf.nest.flatten(batch)):    # or the time would be that at which its making began
            now = tf.timestamp()
        with tf.control_dependencies([self.times.scatter_nd_update([[step % CLOCK_SLOTS]], [now])]):
            return tf.nest.map_structure(tf.identity, batch)


@as_written
def training_batches(source, recipe, batch_size, steps_per_epoch, seed, first_step=0, shuffle=True, bn_group_size=0,
                     labels=False, repeats=1, mixture=None, replicas=1, context=None, workers=0, unreadable=None,
                     clock=None, service=None):
    """Batches of views without end, from global step `first_step` on.

    Args:
        source: of images (moco_tf.data.sources).
        recipe: of views (moco_tf.views.recipes).
        batch_size: of all replicas of all hosts.
        steps_per_epoch: batches that make one pass. What they do not hold is left out of the pass; where they hold more
            than there is, the pass begins again to fill them up.
        seed: of the order, the views and the permutations.
        first_step: global step of the first batch.
        shuffle: permute the views "key" over this host's replicas, for shuffling BN.
        bn_group_size: images that share batch statistics; 0: those of a replica.
        labels: hand out "label" (N,) int64, 0 .. num_classes - 1, and "weight" (N,) float32: 0 where a row only fills up
            the last batch of a pass, else what makes the batch's mean one over its real rows.
        repeats: views of an image that follow each other in the order, and are dealt to the replicas in turn (repeated
            augmentation, arXiv:1902.05509); a pass then sees 1 / repeats of the images.
        mixture: an `ImageMixture` that the views of each image pass through last; None: none does.
        replicas: of this host.
        context: the `tf.distribute.InputContext` of this host; None: there is one host.
        workers: parallel calls; 0: tf.data's choice.
        unreadable: an `Unreadable` that hears of images which do not decode; the next readable one of the batch stands
            in for each. None: they are black.
        clock: a `BatchClock`.
        service: a `DataService` that makes the views; None: this process does.

    Returns:
        A dataset of one replica's share a time, replica after replica: the views by their names, (N, S, S, C) of their
        dtype (of a `cropped` recipe also their numbers), "index" (N,) int64, and where there is a view "key" also
        "key_position" (N,) int32.

    Raises:
        UsageError: the recipe does not take images of the source's number of channels.
    """
    hosts, host = (context.num_input_pipelines, context.input_pipeline_id) if context else (1, 0)
    here = batch_size // hosts
    parallel = workers or tf.data.AUTOTUNE
    steps = tf.data.Dataset.range(first_step, FOREVER)

    def seeds_of(step):
        return image_seeds(seed, step, batch_size)[host * here:(host + 1) * here]

    # One by one beside the loading of each image; where its partners are rows, or images are small, row by row.
    rows_mixed = mixture and (partners_of(mixture, source) == "batch" or _small(source))
    per_epoch = steps_per_epoch * batch_size
    if service:
        examples = _split_examples(source, seed, per_epoch, first_step, repeats, batch_size, hosts)
    else:
        examples = _epochs(source, seed, per_epoch, first_step * batch_size, repeats)
        if hosts > 1:
            examples = examples.enumerate().filter(
                lambda position, _: position % batch_size // here == host).map(lambda _, example: example)
        examples = tf.data.Dataset.zip((examples, steps.map(seeds_of, parallel).unbatch()))
    viewed = _viewed(source, recipe, examples, here, parallel, None if rows_mixed else mixture)
    if service:
        viewed = service.distribute(viewed.with_options(_options()))
    batches = tf.data.Dataset.zip((steps, viewed))
    group = bn_group_size or here // replicas

    def deal(step, readable, batch):
        """The keys in shuffled order, and the batch as (replicas, N, ...)."""
        batch = _without_unreadable(readable, batch, unreadable)
        if rows_mixed:
            batch.update(_mixed_rows(mixture, source, recipe, batch, seeds_of(step)))
        if labels:
            first = step % steps_per_epoch * batch_size
            real = tf.clip_by_value(source.size * repeats - first, 0, batch_size)
            row = host * here + tf.range(here, dtype=tf.int64)
            batch["weight"] = tf.where(row < real, tf.cast(batch_size / real, tf.float32), 0.0)
            batch["label"] = _in_range(batch["label"], source.num_classes, batch["index"])
        else:
            del batch["label"]
        if repeats > 1:    # an image's views to different replicas, whose batches are mixed within themselves
            dealt = tf.reshape(tf.transpose(tf.reshape(tf.range(here), [-1, replicas])), [-1])
            batch = {name: tf.gather(value, dealt) for name, value in batch.items()}
        if "key" in batch:
            order = key_permutation(seed, step, here, group) if shuffle else tf.range(here)
            batch["key_position"] = host * here + positions(order)
            batch.update({name: tf.gather(batch[name], order) for name in ("key", numbers_of("key")) if name in batch})
        if clock:
            batch = clock.stamp(step, batch)
        return {name: tf.reshape(value, [replicas, here // replicas, *value.shape[1:]])
                for name, value in batch.items()}

    dealt = batches.map(lambda step, batch: deal(step, *batch), parallel).unbatch().prefetch(2 * replicas)
    # Said to be endless, or several hosts would ask each other before each step whether all have a batch.
    return dealt.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)).with_options(_options())


@as_written
def evaluation_batches(source, recipe, batch_size, limit=0, seed=0, workers=0, unreadable=None):
    """One pass: full batches of (views, label (n,), index (n,), real (n,) bool).

    Rows that are not `real` are to be left out: they fill up the last batch, or could not be read.

    Args:
        limit: > 0 takes so many images, drawn as in the first epoch of seed 0, if there are more.
        seed: of the views, if they draw anything.
        unreadable: an `Unreadable` that hears of images which do not decode.
    """
    parallel = workers or tf.data.AUTOTUNE
    count = min(limit, source.size) if limit else source.size
    batches = -(-count // batch_size)
    examples = source.examples(0, 0) if count < source.size else source.examples()
    examples = examples.take(count).repeat().take(batches * batch_size)
    steps = tf.data.Dataset.range(batches)
    seeds = steps.map(lambda step: image_seeds(seed, step, batch_size))

    def split(step, readable, batch):
        real = readable & (step * batch_size + tf.range(batch_size, dtype=tf.int64) < count)
        if unreadable:
            with tf.control_dependencies([_report(unreadable, readable, batch["index"])]):
                real = tf.identity(real)
        return {name: batch[name] for name in recipe.views}, batch["label"], batch["index"], real

    viewed = _viewed(source, recipe, tf.data.Dataset.zip((examples, seeds.unbatch())), batch_size, parallel)
    return tf.data.Dataset.zip((steps, viewed)).map(lambda step, batch: split(step, *batch)).prefetch(2).with_options(
        _options())


def image_seeds(seed, step, batch_size):
    """(batch_size, 2) int32: a seed for each image of global batch `step`."""
    return tf.random.stateless_uniform([batch_size, 2], seed=tf.stack([tf.cast(seed, tf.int64), step]),
                                       minval=None, maxval=None, dtype=tf.int32)


def partners_of(mixture, source):
    """Where an `ImageMixture`'s partners come from: "data", "batch", or "" where it has none."""
    return mixture.partners and (mixture.partners if source.random_access else "batch")


def _viewed(source, recipe, examples, batch_size, parallel, mixture=None):
    """(example, its seed (2,)) -> batches (readable (n,) bool, {"index", "label", and the views by name})."""
    recipe.require_channels(source.channels)
    decode = _guarded(source)

    def facts_of(example):
        return {"index": source.index_of(example), "label": source.label(example)}

    if _small(source):
        def views_of_batch(seeds, readable, facts, images):
            return readable, {**facts, **recipe.apply_batch(images, seeds)}

        def read_one(example, image_seed):
            readable, image = decode(example)
            return image_seed, readable, facts_of(example), image

        return examples.map(read_one, parallel).batch(batch_size, drop_remainder=True).map(views_of_batch, parallel)

    if mixture:
        def mixed_views(example, image_seed):
            readable, image = decode(example)
            views = recipe.apply(image, image_seed)
            mixed = mixture.stage(views, recipe.mixture_seed(image_seed), _drawn_from(source, recipe, views))
            return readable, {**facts_of(example), **mixed}

        return examples.map(mixed_views, parallel).batch(batch_size, drop_remainder=True)

    def cropped(example, numbers):
        readable, image = decode(example)
        return readable, {**facts_of(example), **recipe.crop(image, numbers), **numbers}

    some = next(count for count in range(AT_ONCE, 0, -1) if batch_size % count == 0)
    together = examples.batch(some, drop_remainder=True)
    crops = together.map(lambda example, seeds: (example, recipe.draw(seeds)), parallel).unbatch().map(cropped, parallel)
    if recipe.cropped:
        return crops.batch(batch_size, drop_remainder=True)
    parts = crops.batch(some, drop_remainder=True).map(
        lambda readable, part: (readable, recipe.finish(part)), parallel)
    if some == batch_size:
        return parts
    return parts.batch(batch_size // some, drop_remainder=True).map(lambda *batch: tf.nest.map_structure(
        lambda part: tf.reshape(part, [batch_size, *part.shape[2:]]), batch))


def _small(source):
    """Whether a batch of the source's images is augmented in one call."""
    return bool(source.image_shape) and source.image_shape[0] * source.image_shape[1] <= SMALL


def _any_example(source, seed):
    """An example drawn from all of a source with random access, and the seed of its views."""
    index_seed, view_seed = tf.unstack(ops.split(seed, 2))
    return {"index": tf.random.stateless_uniform([], index_seed, 0, source.size, tf.int64, alg="philox")}, view_seed


def _drawn_from(source, recipe, own):
    """A partner for a mixture, seed -> the views of an image drawn from all of a source with random access; `own`, those
    of the image itself, where it cannot be read."""
    decode = _guarded(source)

    def partner(seed):
        example, view_seed = _any_example(source, seed)
        readable, image = decode(example)
        drawn = recipe.apply(image, view_seed)
        return {name: tf.where(readable, drawn[name], own[name]) for name in own}

    return partner


def _mixed_rows(mixture, source, recipe, batch, seeds):
    """The views of a batch, each row mixed by its seed, with any row or with what is drawn from the source.

    All rows in one compiled call, which has the partners that they ask for from another: of small images a call for each
    takes longer than the work.
    """
    views, size = {name: batch[name] for name in recipe.views}, seeds.shape[0]
    compiled = functools.partial(tf.function, autograph=False, jit_compile=recipe.xla)
    from_data = partners_of(mixture, source) == "data"

    @compiled
    def asked_by(seeds):
        """The seeds of the partners that each row may ask for, (size, A, 2), and for which it does, (size, A)."""
        count = mixture.asked(seeds[0])[1].shape[0]
        return tf.map_fn(lambda seed: mixture.asked(recipe.mixture_seed(seed)), seeds, fn_output_signature=(
            tf.TensorSpec([count, 2], tf.int32), tf.TensorSpec([count], tf.bool)))

    @compiled
    def mixed(views, seeds, others, *found):
        def one(row):
            own, seed, *found = row

            def partner(seed):
                if from_data:
                    asked, places = found
                    place = tf.gather(places, tf.argmax(tf.cast(tf.reduce_all(asked == seed, axis=1), tf.int32)))
                else:
                    place = tf.random.stateless_uniform([], seed, 0, size, tf.int32, alg="philox")
                return {name: tf.gather(rows, place) for name, rows in others.items()}

            return mixture.stage(own, recipe.mixture_seed(seed), partner)

        return tf.map_fn(one, (views, seeds, *found), fn_output_signature={
            name: tf.TensorSpec(view.shape[1:], view.dtype) for name, view in views.items()})

    if not from_data:
        return mixed(views, seeds, views)
    asked, which = asked_by(seeds)
    places = tf.reshape(tf.cumsum(tf.cast(tf.reshape(which, [-1]), tf.int32)) - 1, which.shape)
    return mixed(views, seeds, _partners(source, recipe, tf.boolean_mask(asked, which), views), asked, places)


def _partners(source, recipe, seeds, views):
    """The views of the images that the seeds, (M, 2), draw from all of a source with random access; more rows follow them,
    to make whole batches as `views` are one."""
    size = next(iter(views.values())).shape[0]

    def load(seed):
        example, view_seed = _any_example(source, seed)
        return source.decode(example)["image"], view_seed

    loaded = tf.map_fn(load, seeds, fn_output_signature=(
        tf.TensorSpec(source.image_shape, tf.uint8), tf.TensorSpec([2], tf.int32)))
    count = tf.shape(seeds)[0]
    missing = size * tf.maximum(1, -(-count // size)) - count
    batches = [tf.reshape(tf.pad(part, [[0, missing], *[[0, 0]] * (part.shape.rank - 1)]), [-1, size, *part.shape[1:]])
               for part in loaded]
    drawn = tf.map_fn(lambda batch: recipe.apply_batch(*batch), batches, fn_output_signature={
        name: tf.TensorSpec(view.shape, view.dtype) for name, view in views.items()})
    return {name: tf.reshape(view, [-1, *view.shape[2:]]) for name, view in drawn.items()}


def _split_examples(source, seed, per_epoch, first_step, repeats, batch_size, hosts):
    """(example, its seed) without end, from a range of numbers that a service can split among its workers. With random
    access number n is the share of one of the hosts in batch n // hosts; of records it is a shard."""
    here = batch_size // hosts
    if isinstance(source, Records):
        if repeats > 1:
            raise UsageError(f"Repeated augmentation of records does not go with a data service. Received: data.repeats "
                             f"{repeats}. Use 1, or a folder.")
        return _shards(source, seed, first_step * batch_size // per_epoch)
    if not source.random_access:
        raise UsageError("A data service takes a source that can be split among its workers: embedded, folder, records. "
                         f"Received: {type(source).__name__}. `moco-tf data pack` makes records of it.")

    def share(number):
        step, host = number // hosts, number % hosts
        position = step * batch_size + host * here
        examples = _epoch_from(source, seed, per_epoch, position // per_epoch, position % per_epoch, repeats)
        seeds = image_seeds(seed, step, batch_size)[host * here:][:here]
        return tf.data.Dataset.zip((examples, tf.data.Dataset.from_tensor_slices(seeds)))

    return tf.data.Dataset.range(first_step * hosts, FOREVER).flat_map(share)


def _shards(source, seed, first_epoch):
    """(example, its seed) of whole shards, several at a time; the seed is that of the image in the epoch."""
    def seeded(example, epoch):
        drawn = tf.random.fold_in(epoch_key(seed, epoch), source.index_of(example))
        return example, tf.bitcast(drawn, tf.int32)[:, 0]

    count = len(source.shards)
    examples = tf.data.Dataset.range(first_epoch * count, FOREVER).interleave(
        lambda number: source.of_shard(seed, number), cycle_length=min(count, INTERLEAVED_SHARDS),
        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return examples.shuffle(min(source.size, SHUFFLE_BUFFER), seed=seed + 1).map(seeded)


def _epochs(source, seed, per_epoch, first, repeats):
    """Examples without end, `per_epoch` of each epoch's order, from position `first` on."""
    first_epoch, offset = divmod(first, per_epoch)

    def one(epoch):
        done = tf.where(epoch == first_epoch, tf.constant(offset, tf.int64), tf.constant(0, tf.int64))
        return _epoch_from(source, seed, per_epoch, epoch, done, repeats)

    return tf.data.Dataset.range(first_epoch, FOREVER).flat_map(one)


def _epoch_from(source, seed, per_epoch, epoch, done, repeats):
    """The `per_epoch` examples of an epoch's order without its first `done`."""
    examples = source.examples(seed, epoch, tf.minimum(done // repeats, source.size))
    if per_epoch > source.size * repeats:
        again = source.examples(seed, epoch, tf.maximum(done // repeats - source.size, 0))
        examples = examples.concatenate(again)
    if repeats > 1:
        examples = examples.flat_map(lambda example: tf.data.Dataset.from_tensors(example).repeat(repeats))
        examples = examples.skip(done % repeats)
    return examples.take(per_epoch - done)


def _in_range(labels, num_classes, index):
    bad = (labels < 0) | (labels >= num_classes)
    told = ["labels must be from 0 to", num_classes - 1, "but are", tf.boolean_mask(labels, bad), "for the images of index",
            tf.boolean_mask(index, bad)]
    with tf.control_dependencies([tf.debugging.Assert(tf.logical_not(tf.reduce_any(bad)), told)]):
        return tf.identity(labels)


def _guarded(source):
    """example -> (whether it can be read, the image, or a black one): tf.data's errors, without losing count.

    A data set is made for each image, which takes as long as its functions are large. So only the decoding is inside, and
    what decodes any format is set up for those images alone that one operation cannot read; it reads the file again.
    """
    if not source.can_fail:
        return lambda example: (True, source.decode(example)["image"])

    def decode(example):
        examples = tf.data.Dataset.from_tensors(example)
        usual, any_format = (
            examples.map(lambda example, read=read: (True, source.shaped(read(example)))).ignore_errors()
            for read in (source.usual_image, source.image))
        nothing = tf.nest.map_structure(lambda spec: tf.zeros([side or 1 for side in spec.shape], spec.dtype),
                                        usual.element_spec)
        return usual.concatenate(any_format).concatenate(tf.data.Dataset.from_tensors(nothing)).take(1).get_single_element()

    return decode


def _without_unreadable(readable, batch, unreadable):
    """Each unreadable row of a batch is replaced by the next readable one, so that batch sizes stay what they are."""
    if unreadable is None:
        return batch

    def repair():
        size = readable.shape[0]
        ahead = (tf.range(size)[None, :] - tf.range(size)[:, None]) % size    # how far row j lies ahead of row i
        source_row = tf.argmin(tf.where(readable[None, :], ahead, size), axis=1)
        return {name: tf.gather(value, source_row) for name, value in batch.items()}

    some = tf.debugging.Assert(tf.reduce_any(readable), ["no image of a batch is readable"])
    with tf.control_dependencies([_report(unreadable, readable, batch["index"]), some]):
        return tf.cond(tf.reduce_all(readable), lambda: dict(batch), repair)


def _report(unreadable, readable, indexes):
    """Tells an `Unreadable` of a batch, if there is anything to tell."""
    def tell():
        bad = tf.boolean_mask(indexes, tf.logical_not(readable))
        with tf.control_dependencies([unreadable.tell(bad)]):
            return tf.constant(True)

    return tf.cond(tf.reduce_all(readable), lambda: tf.constant(True), tell)


def _options():
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_optimization.inject_prefetch = False    # a second one, whose buffer grows with every wait
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options
