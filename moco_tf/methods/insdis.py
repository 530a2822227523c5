"""Instance discrimination (arXiv:1805.01978): every image is a class, and its row in a memory bank stands for it."""

import math

import tensorflow as tf

from moco_tf import sampling
from moco_tf.distribute import first_row, gather_rows, mean_over_replicas
from moco_tf.errors import UsageError
from moco_tf.losses import (bank_logits, contrastive_logits, estimated_partition, followed_partition, in_batch_logits,
                            info_nce, nce, positive_rank, random_partition, unit)
from moco_tf.memory import MemoryBank
from moco_tf.methods.base import Method
from moco_tf.methods.moco import feature_std

keras = tf.keras

LOSSES = ("nce", "softmax", "full")


class InsDis(Method):
    """One encoder and a memory bank: a query's positive is the row of its own image, its negatives are rows drawn from
    the whole bank with replacement, so that its own may be among them.

    Views: "query", (N, S, S, 3), and "index", (N,) integers below `bank_size`, which a run's pipeline adds.

    Args:
        encoder: images -> (N, dim) embeddings, not normalised.
        dim: C, the length of an embedding.
        bank_size: n, the number of training images.
        temperature: divides the dot products.
        num_negatives: K, at most n; 0 scores all n rows, as "full".
        loss: "nce"; "softmax": InfoNCE over the same 1 + K rows; "full": the softmax over all n rows.
        momentum: the share of a bank's row that an update keeps.
        partition_momentum: of the constant Z of "nce": 1 keeps its first estimate, 0.99 lets it follow the later ones.
        shared_negatives: one draw of K rows a step for all queries, scored by one matrix product, in place of K rows
            for each query. It reads K rows instead of N K; each query's loss has the same expectation, but a batch sees
            fewer different rows, and a row that is drawn pushes all queries at once.
        seed: of the bank's first rows and of the draws.

    Raises:
        UsageError: an unknown loss; no images; more negatives than images; "full" with a number of negatives.
    """

    view_names = ("query",)

    def __init__(self, encoder, dim, bank_size, temperature, num_negatives=0, loss="full", momentum=0.5,
                 partition_momentum=1.0, shared_negatives=False, seed=0, **kwargs):
        super().__init__(encoder, **kwargs)
        if loss not in LOSSES:
            raise UsageError(f"method.loss must be one of {', '.join(LOSSES)}. Received: {loss!r}.")
        if bank_size < 1:
            raise UsageError(f"method.bank_size must be the number of training images. Received: {bank_size}.")
        if not 0 <= num_negatives <= bank_size:
            raise UsageError("method.num_negatives must be at most the number of training images; 0 scores them all. "
                             f"Received: {num_negatives} negatives, {bank_size} images.")
        if loss == "full" and num_negatives:
            raise UsageError("method.loss 'full' scores all images and draws none. Received: method.num_negatives "
                             f"{num_negatives}. Use 0, or the loss 'softmax'.")
        self.criterion = loss if num_negatives else "full"
        self.bank = MemoryBank(bank_size, dim, momentum, seed=seed, name="memory_bank")
        self.partition = tf.Variable(-1.0, dtype=keras.backend.floatx(), name="partition", trainable=False,
                                     aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)    # below 0: unset
        self.temperature, self.num_negatives, self.partition_momentum = temperature, num_negatives, partition_momentum
        self.shared_negatives, self.seed = shared_negatives, seed

    def encode_keys(self, views):
        index = views["index"]
        everywhere = gather_rows(index)
        keys = {"index": index, "all": everywhere}
        if self.criterion == "full":
            return {**keys, "rows": tf.convert_to_tensor(self.bank.rows)}
        if self.shared_negatives:
            return {**keys, "positive": self.bank.read(index), "negatives": self.bank.read(self._draw([]))}
        here = index.shape[0]
        drawn = self._draw([everywhere.shape[0]])[first_row(here):][:here]
        return {**keys, "rows": self.bank.read(tf.concat([index[:, None], tf.cast(drawn, index.dtype)], axis=1))}

    def contrastive_loss(self, views, keys):
        queries = unit(self.encoder(views["query"], training=True))
        outputs = {"queries": queries, "features": tf.stop_gradient(gather_rows(queries))}
        if self.criterion == "full":
            logits = in_batch_logits(queries, keys["rows"], self.temperature)
            losses = info_nce(logits, keys["index"])
            return losses, {**outputs, "logits": logits, "positive": keys["index"], "probability": tf.exp(-losses)}
        if self.shared_negatives:
            logits = contrastive_logits(queries, keys["positive"], keys["negatives"], self.temperature)
        else:
            logits = bank_logits(queries, keys["rows"], self.temperature)
        if self.criterion == "softmax":
            losses = info_nce(logits)
            return losses, {**outputs, "logits": logits, "probability": tf.exp(-losses)}
        estimate = mean_over_replicas(estimated_partition(logits, self.bank.size))
        partition = followed_partition(self.partition, estimate, self.partition_momentum)
        probability = tf.exp(logits[:, 0]) / partition
        return nce(logits, partition, self.bank.size), {**outputs, "logits": logits, "partition": partition,
                                                        "probability": probability}

    def update_memory(self, keys, outputs, write):
        self.bank.update(keys["all"], outputs["features"], write)
        if self.criterion == "nce":
            self.partition.assign(tf.where(write, outputs["partition"], self.partition))

    def metrics_of(self, keys, outputs):
        rank = positive_rank(outputs["logits"], outputs.get("positive"))
        metrics = {"accuracy": tf.reduce_mean(tf.cast(rank < 1, tf.float32)),
                   "accuracy_top5": tf.reduce_mean(tf.cast(rank < 5, tf.float32)),
                   "positive_probability": tf.cast(tf.reduce_mean(outputs["probability"]), tf.float32),
                   "feature_std": feature_std(outputs["features"])}
        if self.criterion == "nce":    # far from 1, features are not of norm 1 or Z has not been followed
            at_random = random_partition(self.bank.size, self.bank.dim, self.temperature)
            metrics["partition_ratio"] = tf.cast(outputs["partition"] / at_random, tf.float32)
        return metrics

    def chance_loss(self, batch_size):
        count = self.num_negatives or self.bank.size - 1
        return math.log(count + 1) + (count * math.log1p(1 / count) if self.criterion == "nce" else 0.0)

    def _draw(self, batch):
        """Negatives of this step, (*batch, K): the same on every replica, whatever their number."""
        return sampling.uniform(self.seed, self.optimizer.iterations, [*batch, self.num_negatives], self.bank.size)
