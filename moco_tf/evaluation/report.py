"""kNN accuracy of an encoder, for a grid of neighbours and temperatures."""

import json
import math

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.evaluation.classifier import complete_config
from moco_tf.evaluation.encoders import open_encoder
from moco_tf.evaluation.knn import BANK_ROWS, even_rows, nearest, votes
from moco_tf.evaluation.metrics import label_rank
from moco_tf.evaluation.splits import cached_splits, own_workdir
from moco_tf.export.exchange import FILES
from moco_tf.files import write_file
from moco_tf.losses import unit

VOTING_ROWS = 4096    # queries whose scores are held at once


def evaluate_knn(config, path, side="query", workdir="", **options):
    """`knn_report` of the encoder at a path, written into a folder's knn.json.

    Args:
        config: whose data section says what to evaluate on; data without a name: those of the encoder's run. A file of
            weights does not tell the size of its images: it gets the config's, or if that is 0, its recipe's.
        path, side: see `open_encoder`.
        workdir: for knn.json; "": that of the encoder, if it is a run's.
        options: of `knn_report`.

    Returns:
        (the report, path of the file; "" if there is no folder for one).
    """
    if not config.data.name:
        config = complete_config(configs.override(config, encoder=path))
    encoder = open_encoder(path, side, config.views.size if path.endswith(FILES) else 0)
    report = knn_report(encoder, config, **options)
    folder = workdir or own_workdir(encoder)
    if folder:
        tf.io.gfile.makedirs(folder)
        write_file(f"{folder}/knn.json", json.dumps(report, indent=2) + "\n")
    return report, folder and f"{folder}/knn.json"


def knn_report(encoder, config, ks=(20, 200), temperatures=(0.07, 0.1), features="backbone", cache=""):
    """Accuracy on the held-out images with all training images as the bank, which is never in memory as a whole.

    Args:
        encoder: a `moco_tf.evaluation.encoders.Encoder`.
        config: what to evaluate on: its data section.
        ks, temperatures: neighbours that vote, and their votes' temperatures; every pair is reported.
        features: "backbone" (pooled features) or "embedding" (the head's output).
        cache: folder for the features; "": see `cached_splits`.

    Returns:
        {"grid": a list of {"k", "temperature", "top1", "top5"}, and what they were measured on}.

    Raises:
        UsageError, DataError: as `cached_splits`; a temperature whose votes float32 cannot hold.
    """
    coldest = 1 / math.log(np.finfo(np.float32).max)
    if min(temperatures) <= coldest:
        raise UsageError(f"A vote is exp(cosine / temperature), for temperatures above {coldest:.4f}. Received: "
                         f"{min(temperatures)}.")
    bank, queries = cached_splits(encoder, config, features, cache)
    cosines, positions = nearest(unit(queries.all()), _unit_blocks(bank), min(max(ks), bank.count))
    labels = bank.labels[positions]
    grid = [{"k": k, "temperature": temperature,
             **_accuracy(cosines[:, :k], labels[:, :k], temperature, bank.num_classes, queries.labels)}
            for k in ks for temperature in temperatures]
    return {"encoder": encoder.description, "path": encoder.path, "step": encoder.step, "features": features,
            "dim": bank.dim, "image_size": encoder.size, "bank": bank.count, "queries": queries.count,
            "left_out": bank.left_out + queries.left_out, "grid": grid}


def _unit_blocks(bank):
    with tqdm(total=bank.count, desc="nearest neighbours", unit="row") as bar:
        for block in bank.blocks(even_rows(bank.count, BANK_ROWS)):
            yield unit(tf.constant(block))
            bar.update(len(block))


def _accuracy(cosines, neighbours, temperature, num_classes, labels):
    """{"top1", "top5"} of the votes of neighbours with these cosines and labels, (q, k) both."""
    ranks = [label_rank(votes(cosines[i:i + VOTING_ROWS], neighbours[i:i + VOTING_ROWS], temperature, num_classes),
                        labels[i:i + VOTING_ROWS]) for i in range(0, len(labels), VOTING_ROWS)]
    rank = np.concatenate(ranks)
    return {"top1": float(np.mean(rank < 1)), "top5": float(np.mean(rank < 5))}
