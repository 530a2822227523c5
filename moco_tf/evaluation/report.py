"""kNN accuracy of a run's encoder, for a grid of neighbours and temperatures."""

from tqdm import tqdm

from moco_tf.data.pipeline import evaluation_batches
from moco_tf.errors import DataError
from moco_tf.evaluation.features import Extractor
from moco_tf.evaluation.knn import knn_scores, top_k_accuracy
from moco_tf.train import FEATURES, evaluation_recipe, open_data, restore_method


def knn_report(config, workdir, ks=(20, 200), temperatures=(0.07, 0.1), features="backbone", batch_size=250):
    """Accuracy on the held-out images, all training images as the bank.

    Args:
        config: what to evaluate on: its data section; the encoder's own config is the workdir's.
        workdir: of a run.
        ks, temperatures: neighbours that vote, and their votes' temperatures; every pair is reported.
        features: "backbone" (pooled features) or "embedding" (the head's output).

    Returns:
        A list of {"k", "temperature", "top1", "top5"}.

    Raises:
        UsageError: no run in the workdir. DataError: no labels, or nothing held out.
    """
    method, own, step = restore_method(workdir)
    train, held_out = open_data(config)
    if not train.num_classes:
        raise DataError("kNN accuracy needs labels: class folders, or labelled records. Received: images without. "
                        "Training reports view retrieval for such.")
    if held_out is None or held_out.class_names != train.class_names:
        raise DataError("kNN accuracy needs held-out images of the same classes. Received: "
                        f"{'none' if held_out is None else f'{held_out.num_classes} classes, not the same {train.num_classes}'}. "
                        "Name them by data.eval_split.")
    whole = evaluation_recipe(own, train)
    extractor = Extractor(method.encoder, method.normalize)
    column = FEATURES.index(features)
    rows = []
    for name, source in (("bank", train), ("queries", held_out)):
        batches = evaluation_batches(source, whole, batch_size, workers=own.data.workers)
        with tqdm(total=source.size, desc=f"{name} through the encoder of step {step}", unit="image") as bar:
            views, labels, _ = extractor(batches, progress=bar.update)
        rows.append((views["image"][column], labels))
    (bank, bank_labels), (queries, labels) = rows
    report = []
    for k in ks:
        for temperature in temperatures:
            scores = knn_scores(bank, bank_labels, queries, k, temperature, train.num_classes)
            report.append({"k": k, "temperature": temperature, "top1": top_k_accuracy(scores, labels),
                           "top5": top_k_accuracy(scores, labels, 5)})
    return report
