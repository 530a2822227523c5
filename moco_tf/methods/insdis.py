"""Contrast with memory banks: instance discrimination (arXiv:1805.01978), and CMC (arXiv:1906.05849), in which each
branch of the encoder has a bank and meets those of the others."""

import tensorflow as tf

from moco_tf import sampling
from moco_tf.criteria import LOSSES, make_criterion, noted_of
from moco_tf.distribute import gather_rows, own_rows
from moco_tf.errors import UsageError
from moco_tf.losses import bank_logits, contrastive_logits, positive_rank
from moco_tf.memory import MemoryBank, ShardedMemoryBank
from moco_tf.methods.base import Method, accuracies, contrasted, least_feature_std, unit_branches

keras = tf.keras

FULL = "full"


class InsDis(Method):
    """One encoder and a memory bank: every image is a class, and its row in the bank stands for it. A query's positive is
    the row of its own image, as it was before this step, its negatives are rows drawn from the whole bank with
    replacement, so that its own may be among them.

    An encoder of V branches makes V queries of an image and has V banks. A branch's query meets the banks of the other
    branches; the draw is common to all, and the losses of all ordered pairs are summed.

    Views: "query", (N, S, S, channels), and "index", (N,) integers below `bank_size`, which a run's pipeline adds.

    Args:
        encoder: images -> (N, V * dim) embeddings, not normalised.
        dim: C, the length of an embedding.
        bank_size: n, the number of training images.
        temperature: divides the dot products.
        num_negatives: K, at most n; 0 scores all n rows, as "full".
        loss: "nce"; "softmax": InfoNCE over the same 1 + K rows; "full": the softmax over all n rows.
        momentum: the share of a bank's row that an update keeps.
        partition_momentum: of the constant Z of "nce", see `NCE`.
        shared_negatives: one draw of K rows a step for all queries, scored by one matrix product, in place of K rows
            for each query. It reads K rows instead of N K; each query's loss has the same expectation, but a batch sees
            fewer different rows, and a row that is drawn pushes all queries at once.
        shard_bank: each of R replicas holds n / R rows of a bank. Negatives of each query's own then cross between
            devices, so it goes with shared negatives or the full softmax.
        weights: an .npy file of n numbers, by index: an image is drawn as a negative in proportion to its own. The run's
            checkpoints hold them, too. "": all images are drawn alike.
        seed: of the banks' first rows and of the draws.

    Raises:
        UsageError: an unknown loss; no images; more negatives than images; "full" with a number of negatives; weights
            where none are drawn.
        DataError: weights that cannot be read, or drawn by.
    """

    view_names = ("query",)
    against_collapse = "lower the learning rate, or have fewer steps in an epoch: rows of the bank are an epoch old"
    least_branches = 1

    def __init__(self, encoder, dim, bank_size, temperature, num_negatives=0, loss=FULL, momentum=0.5,
                 partition_momentum=1.0, shared_negatives=False, shard_bank=False, weights="", seed=0,
                 **kwargs):
        super().__init__(encoder, **kwargs)
        if loss not in (*LOSSES, FULL):
            raise UsageError(f"method.loss must be one of {', '.join((*LOSSES, FULL))}. Received: {loss!r}.")
        if bank_size < 1:
            raise UsageError(f"method.bank_size must be the number of training images. Received: {bank_size}.")
        if not 0 <= num_negatives <= bank_size:
            raise UsageError("method.num_negatives must be at most the number of training images; 0 scores them all. "
                             f"Received: {num_negatives} negatives, {bank_size} images.")
        if loss == FULL and num_negatives:
            raise UsageError("method.loss 'full' scores all images and draws none. Received: method.num_negatives "
                             f"{num_negatives}. Use 0, or the loss 'softmax'.")
        if weights and not num_negatives:
            raise UsageError("method.weights are those by which negatives are drawn, and all images are scored. Received: "
                             f"{weights}, method.num_negatives 0. Set num_negatives, and the loss nce or softmax.")
        branches = encoder.output_shape[-1] // dim
        if branches < self.least_branches:
            raise UsageError("CMC contrasts the branches of an encoder, so it must have two or more. Received: one. Set "
                             'branches, as (("l_to_ab", 1), ("ab_to_l", 2)), or use the method insdis.')
        kind = ShardedMemoryBank if shard_bank else MemoryBank
        self.banks = [kind(bank_size, dim, momentum, seed=seed + branch, name=f"memory_bank_{branch}")
                      for branch in range(branches)]
        self.pairs = contrasted(branches)
        self.criteria = [
            make_criterion("softmax" if not num_negatives else loss, bank_size, dim, temperature, partition_momentum,
                           name=f"criterion_{query}_{key}") for query, key in self.pairs]
        self.dim, self.temperature, self.num_negatives = dim, temperature, num_negatives
        self.shared_negatives, self.seed, self.table = shared_negatives, seed, ()
        if weights:
            acceptance, alias = sampling.read_table(weights, bank_size)
            state = dict(trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
            self.table = (tf.Variable(acceptance, dtype=tf.float32, name="acceptance", **state),
                          tf.Variable(alias, name="alias", **state))

    def encode_keys(self, views):
        index = views["index"]
        keys = {"index": index, "all": gather_rows(index)}
        if not self.num_negatives:
            return keys
        if self.shared_negatives:
            drawn = self._draw([])
            return {**keys, "positive": [bank.read(index) for bank in self.banks],
                    "negatives": [bank.read(drawn, alike=True) for bank in self.banks]}
        drawn = own_rows(self._draw([keys["all"].shape[0]]), index.shape[0])
        rows = tf.concat([index[:, None], tf.cast(drawn, index.dtype)], axis=1)
        return {**keys, "rows": [bank.read(rows) for bank in self.banks]}

    def encode_queries(self, views):
        return unit_branches(self.encoder(views["query"], training=True), self.dim)

    def compare(self, queries, keys):
        noted = keys.get("noted", [None] * len(self.pairs))
        losses, ranks, noted = zip(*(
            self._compare(criterion, queries[query], keys, key, note) for criterion, (query, key), note in
            zip(self.criteria, self.pairs, noted)))
        return tf.add_n(losses), {"queries": queries, "rank": tf.concat(ranks, axis=0), "noted": noted,
                                  "losses": [tf.reduce_mean(loss) for loss in losses]}

    def update_memory(self, keys, outputs, write):
        for bank, queries in zip(self.banks, outputs["queries"]):
            bank.update(keys["all"], gather_rows(tf.stop_gradient(queries)), write)
        for criterion, noted in zip(self.criteria, outputs["noted"]):
            criterion.update(noted, write)

    def metrics_of(self, keys, outputs):
        metrics = {**accuracies(outputs["rank"]), "feature_std": least_feature_std(outputs["queries"])}
        of_pairs = [criterion.metrics_of(noted) for criterion, noted in zip(self.criteria, outputs["noted"])]
        metrics.update({name: tf.reduce_mean([values[name] for values in of_pairs]) for name in of_pairs[0]})
        if len(self.pairs) > 1:
            metrics.update({f"loss_{query + 1}_to_{key + 1}": tf.cast(loss, tf.float32)
                            for (query, key), loss in zip(self.pairs, outputs["losses"])})
        return metrics

    def chance_loss(self, batch_size):
        return len(self.pairs) * self.criteria[0].chance(self.num_negatives or self.banks[0].size - 1)

    def _compare(self, criterion, queries, keys, branch, noted):
        """(N,) losses of queries against the bank of a branch, (N,) ranks of their positives, and what was noted; `noted`
        earlier in the step, or None."""
        if not self.num_negatives:
            losses, rank = self.banks[branch].full_softmax(queries, keys["index"], self.temperature)
            return losses, rank, noted_of(losses)
        if self.shared_negatives:
            logits = contrastive_logits(queries, keys["positive"][branch], keys["negatives"][branch], self.temperature)
        else:
            logits = bank_logits(queries, keys["rows"][branch], self.temperature)
        losses, noted = criterion(logits, noted)
        return losses, positive_rank(logits), noted

    def _draw(self, batch):
        """Negatives of this step, (*batch, K): the same on every replica, whatever their number."""
        shape, step = [*batch, self.num_negatives], self.optimizer.iterations
        if self.table:
            return sampling.weighted(self.seed, step, shape, self.table)
        return sampling.uniform(self.seed, step, shape, self.banks[0].size)


class CMC(InsDis):
    """Contrastive multiview coding: `InsDis` with an encoder of two branches or more, CMC's luminance and chroma.

    Raises:
        UsageError: as `InsDis` does; an encoder of one branch.
    """

    least_branches = 2
