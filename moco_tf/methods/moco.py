"""Momentum Contrast v1 and v2 (arXiv:1911.05722, Algorithm 1; arXiv:2003.04297), which differ in their configs only."""

import tensorflow as tf

from moco_tf.criteria import make_criterion
from moco_tf.distribute import own_rows
from moco_tf.errors import UsageError
from moco_tf.losses import contrastive_logits, positive_rank
from moco_tf.memory import Queue
from moco_tf.methods.base import accuracies, contrasted, least_feature_std
from moco_tf.methods.two_encoders import TwoEncoders
from moco_tf.momentum import momentum_copy, momentum_update, require_momentum


class MoCo(TwoEncoders):
    """A query encoder, its momentum encoder, and a queue of the momentum encoder's keys as negatives.

    An encoder of V branches (CMC's) makes V queries and V keys of an image; a branch's query meets the keys of the other
    branches, those of its image and those in the queue, and the losses of all ordered pairs are summed.

    Args:
        encoder: images -> (N, V * dim) embeddings, not normalised.
        dim: C, the length of an embedding.
        queue_size: K; at least one global batch, two for a symmetric loss.
        temperature: divides the cosines.
        momentum: m of the momentum encoder.
        loss: "softmax": InfoNCE; "nce", with one Z a pair of branches.
        num_images: n, the number of training images, for "nce".
        partition_momentum: of the constant Z of "nce", see `NCE`.
        symmetric: each view is query and key, two terms that are summed (MoCo's CIFAR-10 notebook); the keys of both
            enter the queue, those of the view "query" first.
        shuffle_bn, bn_group_size: as of `TwoEncoders`.
        seed: of the queue's first rows and of the permutations.

    Raises:
        UsageError: an unknown loss; "nce" without `num_images`; `symmetric` with `shuffle_bn="input"`; a momentum outside
            0 .. 1.
    """

    against_collapse = "lower the learning rate, or raise the momentum or the queue"

    def __init__(self, encoder, dim, queue_size, temperature, momentum, loss="softmax", num_images=0,
                 partition_momentum=0.99, symmetric=False, shuffle_bn="input", bn_group_size=0, seed=0, **kwargs):
        super().__init__(encoder, momentum_copy(encoder), dim, shuffle_bn, bn_group_size, seed, **kwargs)
        if symmetric and shuffle_bn == "input":
            raise UsageError("A symmetric loss makes keys of both views, and the pipeline permutes one. Received: "
                             "method.symmetric with shuffle_bn input. Use shuffle_bn=cross_replica.")
        require_momentum(momentum)
        branches = encoder.output_shape[-1] // dim
        self.queue = Queue(queue_size, dim, branches, seed=seed, name="queue")
        self.pairs = contrasted(branches)
        self.criteria = [make_criterion(loss, num_images, dim, temperature, partition_momentum,
                                        name=f"criterion_{query}_{key}") for query, key in self.pairs]
        self.temperature, self.momentum = temperature, momentum
        # The views of each term of the loss: (that of the query, that of the key).
        self.terms = (("query", "key"), ("key", "query")) if symmetric else (("query", "key"),)
        self.query_names = tuple(query for query, _ in self.terms)

    def encode_keys(self, views):
        momentum_update(self.key_encoder, self.encoder, self.momentum)
        keys = {key: tf.stop_gradient(self.keys_of(views, key)) for _, key in self.terms}
        return {"all": tf.concat([keys[name] for name in ("query", "key") if name in keys], axis=0),
                "positive": [own_rows(keys[key], views[key].shape[0]) for _, key in self.terms],
                "negatives": tf.convert_to_tensor(self.queue.keys)}

    def compare(self, queries, keys):
        losses, logits, noted = [], [], list(keys.get("noted", [None] * len(self.pairs)))
        for query, positive in zip(queries, keys["positive"]):
            of_query, of_key, of_queue = map(self.branches_of, (query, positive, keys["negatives"]))
            for pair, (criterion, (i, j)) in enumerate(zip(self.criteria, self.pairs)):
                logits.append(contrastive_logits(of_query[i], of_key[j], of_queue[j], self.temperature))
                loss, note = criterion(logits[-1], noted[pair])
                losses.append(loss)
                noted[pair] = noted[pair] or note
        return tf.add_n(losses), {"queries": queries, "logits": logits, "noted": noted,
                                  "rank": tf.concat([positive_rank(term) for term in logits], axis=0)}

    def update_memory(self, keys, outputs, write):
        self.queue.enqueue(keys["all"], write)
        for criterion, noted in zip(self.criteria, outputs["noted"]):
            criterion.update(noted, write)

    def metrics_of(self, keys, outputs):
        of_pairs = [criterion.metrics_of(noted) for criterion, noted in zip(self.criteria, outputs["noted"])]
        return {**accuracies(outputs["rank"]), "feature_std": least_feature_std(self.branches_of(keys["all"])),
                **{name: tf.reduce_mean([values[name] for values in of_pairs]) for name in of_pairs[0]}}

    def chance_loss(self, batch_size):
        return len(self.terms) * len(self.pairs) * self.criteria[0].chance(self.queue.size)

    def mixed(self, views, mix):
        """A symmetric loss has the mixtures of the first view as queries of both terms, as Un-Mix's CIFAR script does."""
        mixtures = mix(views["query"])
        return {**views, **{name: mixtures for name in self.query_names}}
