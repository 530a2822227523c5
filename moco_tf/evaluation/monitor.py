"""Is it learning? What is measured of an encoder while it is pre-trained."""

import functools

from moco_tf.data.pipeline import Unreadable, evaluation_batches
from moco_tf.evaluation.knn import branch_retrieval, knn_scores, view_retrieval
from moco_tf.evaluation.metrics import top_k_accuracy


class PretrainingMeasures:
    """kNN accuracy where there are labels, view retrieval in any case, both on held-out images.

    Args:
        options: the config's monitor section.
        train, held_out: sources.
        views: the recipe of the run's views.
        whole: the recipe that shows an image as it is evaluated.
        extractor: of the query encoder.
        column: 0: features vote, 1: embeddings do.
        batch_size, workers, seed: of the run.
        unreadable: the training source's `Unreadable`.
        branches: how many the encoder has. With several, one branch's embedding of a whole image retrieves another's;
            with one, a view that the recipe draws retrieves another of the same image.
    """

    def __init__(self, options, train, held_out, views, whole, extractor, column, batch_size, workers, seed, unreadable,
                 branches=1):
        batches = functools.partial(evaluation_batches, batch_size=batch_size, workers=workers)
        apart = Unreadable(held_out, limit=1.0)
        self.branches = branches
        self.pairs = batches(held_out, views.pair(), limit=options.queries, seed=seed, unreadable=apart)
        self.labelled = train.num_classes > 0 and held_out.class_names == train.class_names
        self.bank = batches(train, whole, limit=options.bank, unreadable=unreadable)
        self.queries = batches(held_out, whole, limit=options.queries, unreadable=apart)
        self.extractor, self.num_classes, self.column = extractor, train.num_classes, column
        self.k, self.temperature = options.k, options.temperature

    def __call__(self):
        """{"knn_top1": in [0, 1], where there are labels, "view_retrieval": in [0, 1]}."""
        values = {}
        if self.labelled:
            bank, bank_labels, _ = self.whole_images(self.bank)
            if (bank_labels >= 0).all():    # those of a split without labels are -1, as STL-10's
                queries, labels, _ = self.whole_images(self.queries)
                scores = knn_scores(bank[self.column], bank_labels, queries[self.column], self.k, self.temperature,
                                    self.num_classes)
                values["knn_top1"] = top_k_accuracy(scores, labels)
        values["view_retrieval"] = self.view_retrieval()
        return values

    def view_retrieval(self):
        """In [0, 1]."""
        if self.branches > 1:
            (_, embeddings), _, _ = self.whole_images(self.queries)
            return branch_retrieval(embeddings, self.branches)
        views, _, _ = self.extractor(self.pairs)
        (_, first), (_, second) = list(views.values())[:2]
        return view_retrieval(first, second)

    def whole_images(self, batches):
        """((features, embeddings), labels, index) of the bank or the queries."""
        views, labels, index = self.extractor(batches)
        return views["image"], labels, index
