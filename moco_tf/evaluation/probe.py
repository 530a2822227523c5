"""The fast linear probe: on features computed once, a grid of learning rates and weight decays trained in one pass."""

import concurrent.futures
import itertools
import json

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from moco_tf import config as configs
from moco_tf.callbacks import saved_checkpoints
from moco_tf.errors import DataError, DivergedError, UsageError
from moco_tf.evaluation.encoders import open_encoder
from moco_tf.evaluation.layers import at_layer
from moco_tf.evaluation.metrics import summary
from moco_tf.evaluation.splits import cached_splits
from moco_tf.files import write_file
from moco_tf.optim.schedules import EpochSchedule
from moco_tf.optim.sgd import SGD
from moco_tf.train import is_run, read_config, versions

MOMENTUM = 0.9              # of SGD, and
STDDEV = 0.01               # of the initial weights, as in the protocol (MoCo v1, sec. 4.1, and its code)
EPSILON = 1e-5              # of the BatchNorm
RESIDENT_BYTES = 2 << 30    # of features kept on the device; more are streamed
MIXED_BYTES = 256 << 20     # of features that a stream shuffles at a time
SPAN_BYTES = 128 << 10      # of neighbouring rows that a stream reads at a time
SCORED_ROWS = 1024          # whose logits are held at once


class Classifiers(tf.Module):
    """Linear classifiers side by side, one for each cell of a grid, which learn from the same batches.

    Args:
        weights: (D, C), which all begin with; their biases begin at 0.
        cells: G, how many.
        optimizer: whose rates may be arrays (G, 1): parameters are (D, G, C) and (G, C).
        mean, deviation: (D,) each, which the features are normalised with; None: they are taken as they are.
    """

    def __init__(self, weights, cells, optimizer, mean=None, deviation=None):
        super().__init__()
        self.weights = tf.Variable(tf.repeat(weights[:, None], cells, axis=1))
        self.biases = tf.Variable(tf.zeros([cells, weights.shape[1]], self.weights.dtype))
        self.optimizer, self.mean, self.deviation = optimizer, mean, deviation
        optimizer.build([self.weights, self.biases])

    def logits(self, rows):
        """(B, D) -> (B, G, C)."""
        if self.mean is not None:
            rows = (rows - self.mean) / self.deviation
        return tf.einsum("bd,dgc->bgc", rows, self.weights) + self.biases

    def step(self, rows, labels, real):
        """One step of every classifier on rows (B, D), labels (B,), of which only the `real` (B,) count.

        Returns:
            (G,) mean losses before it.
        """
        with tf.GradientTape() as tape:
            logits = self.logits(rows)
            every = tf.repeat(labels[:, None], logits.shape[1], axis=1)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(every, logits)    # (B, G)
            real = tf.cast(real, losses.dtype)[:, None]
            means = tf.reduce_sum(losses * real, axis=0) / tf.reduce_sum(real)
            total = tf.reduce_sum(means)    # each mean depends on its own classifier only
        parameters = [self.weights, self.biases]
        self.optimizer.apply_gradients(zip(tape.gradient(total, parameters), parameters))
        return means

    @tf.function(reduce_retracing=True)
    def steps(self, rows, labels, order, real):
        """Steps on the batches that `order` (S, B) picks from rows (n, D); sums of the losses (G,)."""
        sums = tf.zeros([self.weights.shape[1]], self.weights.dtype)
        for i in tf.range(tf.shape(order)[0]):
            sums += self.step(tf.gather(rows, order[i]), tf.gather(labels, order[i]), real[i])
        return sums

    @tf.function(reduce_retracing=True)
    def right(self, rows, labels):
        """(G,) of how many rows each classifier names the label."""
        return tf.math.count_nonzero(tf.argmax(self.logits(rows), axis=2) == labels[:, None], axis=0)


def fast_linear(config, workdir, cache=None):
    """`fast_probe` of a config's encoder; writes config.json and results.json into `workdir`, returns the results."""
    if is_run(workdir) and (saved_checkpoints(f"{workdir}/checkpoints")
                            or read_config(workdir).method.name != config.method.name):
        raise UsageError("A fast probe's workdir must be new, or an earlier fast probe's. Received: "
                         f"{workdir}, which holds another run. Name another by --workdir.")
    encoder = open_encoder(config.encoder, config.side, config.views.size, config.precision)
    if "layer" in config:
        encoder = at_layer(encoder, config.layer, **config.get("pool", {}))
    results = {**fast_probe(encoder, config, cache or ""), "seed": config.seed, "versions": versions()}
    print(table(results))
    tf.io.gfile.makedirs(workdir)
    write_file(f"{workdir}/config.json", configs.to_json(config))
    write_file(f"{workdir}/results.json", json.dumps(results, indent=2) + "\n")
    return results


def table(results):
    """The grid of `fast_probe` as lines of text: selection accuracies, a row for each learning rate."""
    grid, chosen = results["grid"], results["chosen"]
    decays = sorted({cell["weight_decay"] for cell in grid})
    lrs = sorted({cell["lr"] for cell in grid})
    shown = {(cell["lr"], cell["weight_decay"]): "diverged" if cell["selection_top1"] is None else
             f"{cell['selection_top1']:.2%}" + ("*" if cell == chosen else " ") for cell in grid}
    lines = [f"accuracy on {results['selection_images']} training images set apart, by learning rate and weight decay "
             "(* chosen):", " " * 10 + "".join(f"{decay:>12g}" for decay in decays)]
    lines += [f"{lr:>10g}" + "".join(f"{shown[lr, decay]:>12}" for decay in decays) for lr in lrs]
    if chosen["lr"] in (lrs[0], lrs[-1]):
        lines.append("note: the chosen learning rate is at the end of the grid; more beyond it, in fast.lrs, may help.")
    return "\n".join(lines)


def fast_probe(encoder, config, cache="", features="backbone"):
    """Accuracy of a linear classifier on frozen features of whole images, its learning rate and decay picked for it.

    SGD with momentum, N(0, 0.01^2) initial weights, half a cosine from each learning rate to 0. The cell of the grid is
    picked on a part of the training images that takes no part in the training; it then begins again on all of them, and
    only this classifier sees the held-out images. Everything drawn is a function of config.seed.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        config: its data section says which images; its section `fast` has `lrs`, used as given whatever the batch size,
            `weight_decays`, `epochs`, `batch_size`, `holdout`, the share of each class to pick by (at least one image,
            and never all), and `batch_norm`: normalise the features by the mean and variance of the training features.
        cache: folder for the features; "": see `cached_splits`.
        features: "backbone" or "embedding".

    Returns:
        `summary` of the held-out images; "grid": every cell's "lr", "weight_decay", "selection_top1" and "loss" of its
        last epoch, the latter two None where it diverged; "chosen": the cell picked; and what this was measured on.

    Raises:
        UsageError, DataError: a wrong grid; as `cached_splits`. DivergedError: no cell stayed finite.
    """
    options = config.fast
    _check(options)
    train, test = cached_splits(encoder, config, features, cache)
    for_selection = selection_part(train.labels, options.holdout, config.seed)
    rows = _Rows(train)
    mean, deviation = _statistics(train) if options.batch_norm else (None, None)

    def trained(cells, keep, title):
        lrs, decays = (np.array(column, train.dtype)[:, None] for column in zip(*cells))
        batch_size = min(options.batch_size, int(keep.sum()))
        steps = -(-int(keep.sum()) // batch_size)
        schedule = EpochSchedule("half_cosine", lrs, options.epochs, steps, per_step=True)
        first = np.random.default_rng(config.seed).normal(0, STDDEV, (train.dim, train.num_classes)).astype(train.dtype)
        classifiers = Classifiers(first, len(cells), SGD(schedule, MOMENTUM, decays), mean, deviation)
        with tqdm(range(options.epochs), desc=title, unit="epoch") as bar:
            for epoch in bar:
                rng = np.random.default_rng([config.seed, epoch])
                sums = sum(classifiers.steps(*batches) for batches in rows.batches(keep, batch_size, rng))
                losses = sums.numpy() / steps
                bar.set_postfix_str(f"loss {np.nanmin(losses):.3f}" if np.isfinite(losses).any() else "diverged", False)
        return classifiers, losses

    cells = list(itertools.product(options.lrs, options.weight_decays))
    classifiers, losses = trained(cells, ~for_selection, f"{len(cells)} linear classifiers")
    right = sum(classifiers.right(*block).numpy() for block in _blocks(train, for_selection))
    grid = [{"lr": lr, "weight_decay": decay, "selection_top1": float(count / for_selection.sum()) if finite else None,
             "loss": float(loss) if finite else None}
            for (lr, decay), count, loss, finite in zip(cells, right, losses, _finite(classifiers, losses))]
    finite = [cell for cell in grid if cell["selection_top1"] is not None]
    if not finite:
        raise DivergedError(f"A learning rate must keep the classifier finite. Received: {options.lrs}, of which none "
                            "does. Add lower ones to fast.lrs, or set fast.batch_norm.")
    chosen = max(finite, key=lambda cell: cell["selection_top1"])    # the first, with the lowest rates, of equals
    classifiers, _ = trained([(chosen["lr"], chosen["weight_decay"])], np.ones(train.count, bool), "the chosen one")
    blocks = _blocks(test, np.ones(test.count, bool))
    logits = np.concatenate([classifiers.logits(block).numpy()[:, 0] for block, _ in blocks])
    return {**summary(logits, test.labels), "chosen": chosen, "grid": grid, "batch_norm": options.batch_norm,
            "epochs": options.epochs, "batch_size": options.batch_size, "encoder": encoder.description,
            "path": encoder.path, "features": features, "dim": train.dim, "image_size": encoder.size, "images": train.count,
            "selection_images": int(for_selection.sum()), "held_out_images": test.count,
            "left_out": train.left_out + test.left_out}


def selection_part(labels, share, seed):
    """(n,) bool: of each class round(share * its rows), at least one and never all, drawn by the seed.

    Raises:
        DataError: no class has two rows.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        chosen[own[:min(max(1, round(share * len(own))), len(own) - 1)]] = True
    if not chosen.any():
        raise DataError("Some class must have two training images, one to train on and one to pick by. Received: "
                        f"{len(labels)} images of as many classes.")
    return chosen


class _Rows:
    """Batches of features: kept on the device where RESIDENT_BYTES hold them, else streamed from their files."""

    def __init__(self, features):
        self.features = features
        self.row_bytes = features.dim * features.dtype.itemsize
        self.resident = None
        if features.count * self.row_bytes <= RESIDENT_BYTES:
            self.resident = tf.constant(features.all()), tf.constant(features.labels)

    def batches(self, keep, size, rng):
        """One pass over the rows to `keep` (n,), in an order drawn by `rng`: one or more of (rows (m, D), labels (m,),
        order (S, size) of positions in them, real (S, size) bool). Only the last batch may have some that are not real.

        A stream reads short spans of neighbouring rows from all over the files and shuffles MIXED_BYTES of them at a
        time, because neighbours are often of one class.
        """
        if self.resident:
            yield (*self.resident, *_in_batches(rng.permutation(np.flatnonzero(keep)), size))
            return
        span, features = max(1, SPAN_BYTES // self.row_bytes), self.features
        spans = [(shard, first, min(span, count - first))
                 for shard, count in enumerate(features.shards) for first in range(0, count, span)]
        per_group = max(1, MIXED_BYTES // (span * self.row_bytes))
        order = rng.permutation(len(spans))
        groups = [[spans[i] for i in sorted(order[at:at + per_group])] for at in range(0, len(spans), per_group)]
        held = np.empty([0, features.dim], features.dtype), np.empty([0], np.int64)
        for last, (rows, labels) in _ahead(groups, lambda group: self._read(group, keep)):
            rows, labels = np.concatenate([held[0], rows]), np.concatenate([held[1], labels])
            drawn = rng.permutation(len(rows))
            whole = len(rows) if last else len(rows) // size * size
            if whole:
                yield tf.constant(rows), tf.constant(labels), *_in_batches(drawn[:whole], size)
            held = rows[drawn[whole:]], labels[drawn[whole:]]

    def _read(self, group, keep):
        """(rows, labels) of those to keep in some spans, which are in order of the shards."""
        rows, labels = [], []
        for shard, spans in itertools.groupby(group, key=lambda span: span[0]):
            spans = [(first, count) for _, first, count in spans]
            positions = self.features.starts[shard] + np.concatenate([np.arange(f, f + n) for f, n in spans])
            rows.append(self.features.read(shard, spans)[keep[positions]])
            labels.append(self.features.labels[positions][keep[positions]])
        return np.concatenate(rows), np.concatenate(labels)


def _in_batches(positions, size):
    """(n,) -> (S, size) with 0 where none is left, and the same shape of bool, which are real."""
    count = -(-len(positions) // size) * size
    order = np.concatenate([positions, np.zeros(count - len(positions), np.int64)])
    return tf.constant(order.reshape(-1, size)), tf.constant((np.arange(count) < len(positions)).reshape(-1, size))


def _ahead(items, load):
    """(whether it is the last, load(item)) of each item; the next one loads meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(load, items[0])
        for following in items[1:]:
            loaded, coming = coming.result(), pool.submit(load, following)
            yield False, loaded
        yield True, coming.result()


def _blocks(features, keep):
    """(rows, labels) of the rows to `keep`, in order."""
    for first, rows in zip(itertools.count(0, SCORED_ROWS), features.blocks(SCORED_ROWS)):
        here = slice(first, first + len(rows))
        yield tf.constant(rows[keep[here]]), tf.constant(features.labels[here][keep[here]])


def _statistics(features):
    """Mean and square root of variance + EPSILON of each feature, (D,) both, of the features' dtype."""
    count, mean, squares = 0, 0.0, 0.0
    for rows in features.blocks(8 * SCORED_ROWS):    # Chan's rule for joining means and sums of squared differences
        rows = rows.astype(np.float64)
        new, own = count + len(rows), rows.mean(axis=0)
        squares += ((rows - own) ** 2).sum(axis=0) + (own - mean) ** 2 * count * len(rows) / new
        count, mean = new, mean + (own - mean) * len(rows) / new
    return mean.astype(features.dtype), np.sqrt(squares / count + EPSILON).astype(features.dtype)


def _finite(classifiers, losses):
    """(G,) bool: whose weights and loss are."""
    weights = np.isfinite(classifiers.weights.numpy()).all(axis=(0, 2))
    return weights & np.isfinite(classifiers.biases.numpy()).all(axis=1) & np.isfinite(losses)


def _check(options):
    if not options.lrs or min(options.lrs) <= 0 or not options.weight_decays or min(options.weight_decays) < 0:
        raise UsageError("fast.lrs must be positive, fast.weight_decays not negative, one or more of each. Received: "
                         f"{options.lrs}, {options.weight_decays}.")
    if options.epochs < 1 or options.batch_size < 1 or not 0 < options.holdout < 1:
        raise UsageError("fast.epochs and fast.batch_size must be at least 1, fast.holdout between 0 and 1. Received: "
                         f"{options.epochs}, {options.batch_size}, {options.holdout}.")
