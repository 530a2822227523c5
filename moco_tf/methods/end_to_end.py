"""The end-to-end mechanism that MoCo is compared with (arXiv:1911.05722, sec. 3.2 and fig. 2a): both encoders learn."""

import math

import tensorflow as tf

from moco_tf.criteria import require_temperature
from moco_tf.distribute import first_row
from moco_tf.losses import in_batch_logits, info_nce, positive_rank
from moco_tf.methods.base import accuracies, contrasted, least_feature_std
from moco_tf.methods.two_encoders import TwoEncoders
from moco_tf.momentum import copy_of


class EndToEnd(TwoEncoders):
    """The keys of a batch are positives and negatives alike, so that K is one less than the global batch, and gradients
    flow through queries and keys. Key images are shuffled as MoCo's are, and so are its views.

    Args:
        encoder: images -> (N, V * dim) embeddings, not normalised; V branches as of `MoCo`.
        dim: C, the length of an embedding.
        temperature: divides the cosines.
        shared: one network encodes queries and keys; otherwise there are two, which start alike.
        kwargs: shuffle_bn, bn_group_size and seed as of `TwoEncoders`.

    Raises:
        UsageError: a temperature not above 0.
    """

    against_collapse = "lower the learning rate, or raise the batch"

    def __init__(self, encoder, dim, temperature, shared=False, shuffle_bn="input", bn_group_size=0, seed=0, **kwargs):
        super().__init__(encoder, encoder if shared else copy_of(encoder), dim, shuffle_bn, bn_group_size, seed, **kwargs)
        require_temperature(temperature)
        self.temperature = temperature
        self.pairs = contrasted(encoder.output_shape[-1] // dim)

    def encode_keys(self, views):
        return {"all": self.keys_of(views, "key")}

    def compare(self, queries, keys):
        here = queries[0].shape[0]
        positive = first_row(here) + tf.range(here)
        of_query, of_key = self.branches_of(queries[0]), self.branches_of(keys["all"])
        logits = [in_batch_logits(of_query[i], of_key[j], self.temperature) for i, j in self.pairs]
        return tf.add_n([info_nce(term, positive) for term in logits]), {
            "queries": queries, "rank": tf.concat([positive_rank(term, positive) for term in logits], axis=0)}

    def metrics_of(self, keys, outputs):
        return {**accuracies(outputs["rank"]), "feature_std": least_feature_std(self.branches_of(keys["all"]))}

    def chance_loss(self, batch_size):
        return len(self.pairs) * math.log(batch_size)
