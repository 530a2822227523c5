"""From files to figures: a recipe's views, runs' curves, an encoder's neighbours and maps."""

import os
import re
import sys

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from moco_tf.callbacks import COLLAPSED_STD, INPUT_BOUND_SHARE, read_lines
from moco_tf.data.pipeline import evaluation_batches
from moco_tf.errors import DataError, UsageError
from moco_tf.evaluation.features import BATCH
from moco_tf.evaluation.knn import nearest
from moco_tf.losses import unit
from moco_tf.train import evaluation_recipe, image_mixture, open_data, read_config, view_recipe
from moco_tf.views import ops
from moco_tf.visualize.figures import AGREES, DISAGREES, UNKNOWN, Panel, curves, installed, maps, sheet

METRICS = ("metrics.jsonl", "monitor.jsonl")
PANELS = (    # title, pattern of the keys, what else a Panel takes; the first pattern that fits a key has it
    ("loss", r"(\w+_)?loss", {}),
    ("accuracy on training batches", r"accuracy(_top\d+)?", dict(percent=True)),
    ("kNN accuracy, held-out images", r"knn_\w+", dict(percent=True)),
    ("accuracy, held-out images", r"(\w+_)?top\d+", dict(percent=True)),
    ("view retrieval, held-out images", r"view_retrieval", dict(percent=True)),
    ("feature standard deviation", r"feature_std", dict(levels=((COLLAPSED_STD, "collapse"),))),
    ("learning rate", r"(\w+_)?learning_rate", {}),
    ("gradient norm", r"gradient_norm", dict(log=True)),
    ("images per second", r"images_per_s", dict(zero=True)),
    ("waiting for data", r"data_wait", dict(percent=True, zero=True, levels=((INPUT_BOUND_SHARE, "input-bound"),))),
    ("skipped steps", r"bad_steps|longest_bad_row", {}),
)
FEWEST_POINTS = 10


# ---------------------------------------------------------------------------------------------- views

def show_views(config, count=6, draws=3):
    """A row for each of `count` training images: itself, then so many draws of each view of the config's recipe, and
    where the config has a mixture in the pipeline the same draws again, as it leaves them: most are not touched.

    Image i is drawn with the seeds (i, 0), (i, 1), ... Mixtures are shown as they mix levels, before a colour space and
    normalisation, and the partners are among the images shown.

    Raises:
        UsageError, DataError: no data, or none that can be read.
    """
    size = config.views.get("size")
    if not config.data.name or size == 0:
        raise UsageError(f"Views need data and a size. Received: data.name {config.data.name!r}, views.size {size}. "
                         "Set them: --config.data.name=... --config.views.size=...")
    source, _ = open_data(config)
    recipe, mixture = view_recipe(config), image_mixture(config)
    # A stream is taken as it is stored: to shuffle it, thousands of images would be read.
    examples = source.examples(0, 0) if source.random_access else source.examples()
    images = list(examples.map(lambda example: source.decode(example)["image"]).ignore_errors().take(count))

    def partner(seed):
        which, drawn = tf.unstack(ops.split(seed, 2))
        return recipe.apply(images[int(ops.uniform(which, []) * len(images))], drawn)

    rows = []
    for i, image in enumerate(images):
        seeds = [tf.constant([i, draw]) for draw in range(draws)]
        drawn = [recipe.apply(image, seed) for seed in seeds]
        mixed = [mixture.stage(views, recipe.mixture_seed(seed), partner)
                 for views, seed in zip(drawn, seeds)] if mixture else []
        shown = [image.numpy(), *(views[name].numpy() for some in (drawn, mixed) for name in recipe.views
                                  for views in some)]
        rows.append([part[..., :3] if part.shape[-1] >= 3 else part[..., 0] for part in shown])
    if not rows:
        raise DataError("Some image must be readable. Received: none that is. `moco-tf data check` lists them.")
    columns = [("original", 1), *((name, draws) for name in recipe.views)]
    if mixture:
        columns += [(f"{name}, {config.mixture.name}", draws) for name in recipe.views]
    sections = [config.views, *([config.mixture] if mixture else [])]
    return sheet(rows, f"Views {config.views.name!r}", columns,
                 note=", ".join(f"{key} {value}" for section in sections for key, value in section.items() if key != "name"))


# ---------------------------------------------------------------------------------------------- curves

def show_curves(workdirs):
    """What runs have logged, over the step: those of one key in one panel.

    Raises:
        UsageError: no run, or nothing logged yet.
    """
    names = [os.path.basename(os.path.normpath(workdir)) for workdir in workdirs]
    if len(set(names)) < len(names):
        names = list(workdirs)
    logged = {name: read_metrics(workdir) for name, workdir in zip(names, workdirs)}
    # A level, not a curve; runs from before it was logged have none.
    chances = sorted({columns.pop("chance_loss")[1][-1] for columns in logged.values() if "chance_loss" in columns})
    keys = list(dict.fromkeys(key for columns in logged.values() for key in columns))
    others = [(key.replace("_", " "), re.escape(key), {}) for key in keys]
    panels = []
    for title, pattern, look in [*PANELS, *others]:
        ours = [key for key in keys if re.fullmatch(pattern, key)]
        keys = [key for key in keys if key not in ours]
        lines = [(name, key, *columns[key]) for key in ours for name, columns in logged.items() if key in columns]
        if title == "loss":
            look = dict(levels=[(chance, f"chance {chance:.2f}") for chance in chances])
        elif title == "skipped steps" and not any(np.any(values) for *_, values in lines):
            continue
        if lines:
            panels.append(Panel(title, lines, **look))
    return curves(panels, names)


def read_metrics(workdir):
    """{key: (steps, values)} of all numbers in metrics.jsonl and monitor.jsonl, in the order of the files."""
    columns = {}
    records = [record for name in METRICS for record in read_lines(f"{workdir}/{name}") if "step" in record]
    for record in records:
        for key, value in record.items():
            if key not in ("step", "epoch") and isinstance(value, (int, float)) and not isinstance(value, bool):
                columns.setdefault(key, []).append((record["step"], value))
    if not columns:
        read_config(workdir)    # says that there is no run, if so
        raise UsageError(f"The run must have logged something. Received: {workdir}, with nothing in "
                         f"{' and '.join(METRICS)} yet: lines come every log.every_steps steps.")
    return {key: tuple(np.array(pairs, float).T) for key, pairs in columns.items()}


# ---------------------------------------------------------------------------------------------- neighbours

def show_neighbours(encoder, train, held_out, queries=10, k=8, split="held-out", bank=10000):
    """Images and their k nearest training images, by cosine of the backbone's features.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        train, held_out: sources; the second one may be None.
        queries: how many images to find neighbours for.
        split: where they are from, "held-out" or "train". A training image is no neighbour of its own; without
            held-out images the training images are asked for.
        bank: how many training images to look among, drawn if there are more; 0 for all.

    Raises:
        UsageError: fewer images than asked for.
    """
    source = train if split == "train" else held_out or train
    size = min(bank or train.size, train.size)
    own = source is train
    if queries > source.size or k > size - own:
        raise UsageError(f"There must be as many images as are shown. Received: {queries} queries of {source.size} "
                         f"images, {k} neighbours among {size - own} others. Lower --queries or --k, or raise --bank.")
    asked, asked_labels, asked_indexes = features_of(encoder, source, queries)
    rows, labels, indexes = features_of(encoder, train, size)
    k = min(k, len(rows) - own)    # where some could not be read
    cosines, positions = nearest(asked, [rows], k + own)
    if own:
        last = np.argsort(indexes[positions] == asked_indexes[:, None], axis=1, kind="stable")
        cosines, positions = (np.take_along_axis(part, last, axis=1)[:, :k] for part in (cosines, positions))
    shown_queries = images_at(encoder, source, asked_indexes, queries)
    shown = images_at(encoder, train, indexes[positions].ravel(), size)
    comparable = train.num_classes > 0 and source.class_names == train.class_names
    agree = labels[positions] == asked_labels[:, None]
    pictures, captions, frames = [], [], []
    for i, found in enumerate(positions):
        pictures.append([shown_queries[asked_indexes[i]], *(shown[indexes[j]] for j in found)])
        captions.append([class_name(source, asked_labels[i]), *(
            f"{cosine:.3f}\n{class_name(train, labels[j])}".strip() for cosine, j in zip(cosines[i], found))])
        frames.append([None, *(np.where(agree[i], AGREES, DISAGREES) if comparable else [UNKNOWN] * len(found))])
    note = f"{encoder.description}. Cosine of backbone features, among {len(rows)} training images."
    if comparable:
        note += f" {np.mean(agree):.0%} of the neighbours are of the query's class: green frame; orange: another class."
    return sheet(pictures, f"Nearest neighbours of {'training' if own else 'held-out'} images",
                 [("query", 1), ("nearest training images", k)], note, captions, frames)


def features_of(encoder, source, limit):
    """Unit rows (n, D), labels (n,) and indexes (n,) of `limit` images, as `evaluation_batches` draws them."""
    @tf.function(reduce_retracing=True)
    def unit_rows(images):
        return unit(encoder.rows(images))

    parts = []
    recipe = evaluation_recipe(encoder.size, source)
    with tqdm(total=limit, desc="images through the encoder", unit="image", disable=limit < BATCH) as bar:
        for views, label, index, real in evaluation_batches(source, recipe, min(BATCH, limit), limit=limit):
            rows = unit_rows(views["image"])
            parts.append([part.numpy()[real.numpy()] for part in (rows, label, index)])
            bar.update(int(real.numpy().sum()))
    rows, labels, indexes = map(np.concatenate, zip(*parts))
    if not len(rows):
        raise DataError("Some image must be readable. Received: none that is. `moco-tf data check` lists them.")
    if not np.isfinite(rows).all():
        raise DataError(f"The features must be finite. Received: some of {encoder.path} ({encoder.description}) "
                        "that are not: the encoder has diverged.")
    return rows, labels, indexes


def images_at(encoder, source, indexes, limit):
    """{index: (S, S, 3) uint8}, as the encoder sees them, of images that `features_of` met with this limit."""
    wanted = tf.constant(sorted(set(indexes.tolist())), tf.int64)
    recipe = evaluation_recipe(encoder.size, source)
    examples = source.examples(0, 0) if limit < source.size else source.examples()
    chosen = examples.filter(lambda example: tf.reduce_any(source.index_of(example) == wanted)).map(source.decode)
    return {int(example["index"]): recipe.apply(example["image"], tf.constant([0, 0]))["image"].numpy()
            for example in chosen.take(len(wanted))}


def class_name(source, label):
    return source.class_names[label] if source.class_names and label >= 0 else ""


# ---------------------------------------------------------------------------------------------- maps

def show_map(encoder, train, held_out, points=2000):
    """Maps of backbone features, unit rows, of held-out images (of training images where there are none): PCA, t-SNE.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        train, held_out: sources; the second one may be None.
        points: images at most, drawn if there are more.

    Raises:
        UsageError: too few images for a map.
    """
    source = held_out or train
    if min(points, source.size) < FEWEST_POINTS:
        raise UsageError(f"A map needs at least {FEWEST_POINTS} images. Received: {points} points of {source.size} "
                         "images.")
    rows, labels, _ = features_of(encoder, source, min(points, source.size))
    plane, shares = principal_components(rows)
    print(f"t-SNE of {len(rows)} points ...", file=sys.stderr, flush=True)
    which = "held-out" if held_out else "training"
    axis_labels = [f"component {i + 1}: {share:.0%} of the variance" for i, share in enumerate(shares)]
    return maps({"PCA": plane, "t-SNE": tsne(rows)}, labels, source.class_names,
                f"Features of {len(rows)} {which} images: {encoder.description}", {"PCA": axis_labels})


def principal_components(rows):
    """The two directions of largest variance: coordinates (n, 2), and their shares of the variance (2,)."""
    pca = installed("sklearn.decomposition").PCA(2, svd_solver="full")
    return pca.fit_transform(rows), pca.explained_variance_ratio_


def tsne(rows):
    """A map (n, 2) in which near rows stay near; distances between far ones tell nothing (van der Maaten 2008)."""
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return installed("sklearn.manifold").TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto",
                                              random_state=0).fit_transform(rows)
