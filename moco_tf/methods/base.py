"""What every method shares: the one training step."""

import tensorflow as tf

from moco_tf.distribute import apply_gradients_if, mean_over_replicas
from moco_tf.losses import unit

keras = tf.keras

LOSS_SCALE_GROWTH_STEPS = 2000    # good steps before float16's loss scale doubles (PyTorch's GradScaler)


class Method(keras.Model):
    """Views to loss: encode_keys(views) -> keys; contrastive_loss(views, keys) -> losses, outputs; update_memory.

    A subclass writes these hooks, each for one replica, and names in `view_names` what views it needs. Its
    `contrastive_loss` is a comparison of queries with keys: encode_queries(views) -> queries, compare(queries, keys) ->
    losses, outputs. Everything outside the encoders is at least float32.

    Args:
        encoder: the query encoder, images (N, S, S, 3) -> (N, C).
        normalize: the step's first op, uint8 views -> what the encoder takes; None: views come normalised.
        finish: before it, a batch of crops -> a batch of whole views (`Recipe.finish_batch`); None: views come whole.
        clip_norm: > 0 scales gradients down to this global norm.
        loss_scaling: for float16: multiplies the loss by a factor that halves on overflow and doubles after
            2,000 good steps; gradients are divided by it.
    """

    view_names = ()
    query_names = ("query",)    # the views that queries are made of
    against_collapse = "lower the learning rate"

    def __init__(self, encoder, normalize=None, finish=None, clip_norm=0.0, loss_scaling=False, **kwargs):
        super().__init__(**kwargs)
        self.encoder = encoder
        self.normalize, self.finish = normalize, finish
        self.clip_norm = clip_norm
        self.loss_scaling = loss_scaling
        self.distribute_reduction_method = "first"    # the step returns means over the replicas already
        state = dict(trainable=False, aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA)
        self.loss_scale = tf.Variable(2.0 ** 16, name="loss_scale", **state)
        self.good_in_row = tf.Variable(0, name="good_steps_in_row", **state)
        self.bad_in_row = tf.Variable(0, name="bad_steps_in_row", **state)
        self.longest_bad_row = tf.Variable(0, name="longest_row_of_bad_steps", **state)
        self.bad_steps = tf.Variable(0, name="bad_steps", **state)

    def compile(self, optimizer, **kwargs):
        super().compile(optimizer=optimizer, **kwargs)
        # Under mixed_float16 Keras wraps the optimizer for a loss scaling of its own.
        self.optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)

    def encode_keys(self, views):
        """Views -> whatever queries are compared with, a dict."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_keys")

    def encode_queries(self, views):
        """Views -> a list of (N, C) unit rows."""
        raise NotImplementedError(f"{type(self).__name__} must define encode_queries")

    def compare(self, queries, keys):
        """Queries and keys -> (N,) losses and a dict of what `update_memory` and `metrics_of` look at, among it "queries",
        as they came, and "rank" (M,) of the positives, as of `positive_rank`."""
        raise NotImplementedError(f"{type(self).__name__} must define compare")

    def contrastive_loss(self, views, keys):
        """Views and keys -> what `compare` returns."""
        return self.compare(self.encode_queries(views), keys)

    def mixed(self, views, mix):
        """The views with those of queries mixed; `mix`: images (N, S, S, channels) -> mixed images."""
        return {**views, **{name: mix(views[name]) for name in self.query_names}}

    def update_memory(self, keys, outputs, write):
        """Remembers this step's keys; must leave every variable as it is where `write` is False."""

    def metrics_of(self, keys, outputs):
        """What is worth following beside the loss: a dict of scalars, of this replica."""
        raise NotImplementedError(f"{type(self).__name__} must define metrics_of")

    def chance_loss(self, batch_size):
        """The loss of guessing, in nats, with so many images in the global batch."""
        raise NotImplementedError(f"{type(self).__name__} must define chance_loss")

    def prepared(self, views):
        """What the pipeline hands out -> what the hooks get: views whole and normalised."""
        views = self.finish(views) if self.finish else views
        return {name: self.normalize(view) if self.normalize and view.dtype == tf.uint8 else view
                for name, view in views.items()}

    @tf.autograph.experimental.do_not_convert    # which would take longer than to trace the step
    def train_step(self, views):
        """One step on a dict of views; returns scalars, equal on all replicas."""
        views = self.prepared(views)
        with tf.GradientTape() as tape:
            keys = self.encode_keys(views)
            losses, outputs = self.contrastive_loss(views, keys)
            loss = tf.reduce_mean(losses)
            scaled = loss * tf.cast(self.loss_scale, loss.dtype) if self.loss_scaling else loss
        variables = self.trainable_weights
        gradients = tape.gradient(scaled, variables)
        loss, gradients = mean_over_replicas((loss, gradients))
        if self.loss_scaling:
            gradients = [g / tf.cast(self.loss_scale, g.dtype) for g in gradients]
        norm = tf.linalg.global_norm(gradients)
        finite = tf.math.is_finite(loss) & tf.math.is_finite(norm)
        if self.clip_norm:
            gradients, _ = tf.clip_by_global_norm(gradients, self.clip_norm, use_norm=norm)
        # A non-finite step is skipped whole: parameters, optimizer and memory stay as they were.
        apply_gradients_if(finite, self.optimizer, gradients, variables)
        self.update_memory(keys, outputs, write=finite)
        self._count(finite)
        return {"loss": loss, "gradient_norm": norm, "bad_steps": self.bad_steps,
                "longest_bad_row": self.longest_bad_row,
                **mean_over_replicas(self.metrics_of(keys, outputs))}

    def _count(self, finite):
        bad = tf.cast(tf.logical_not(finite), tf.int32)
        self.bad_steps.assign_add(bad)
        in_row = (self.bad_in_row + 1) * bad
        self.bad_in_row.assign(in_row)
        self.longest_bad_row.assign(tf.maximum(self.longest_bad_row, in_row))
        if self.loss_scaling:
            good = (self.good_in_row + 1) * (1 - bad)
            grown = good >= LOSS_SCALE_GROWTH_STEPS
            factor = tf.where(finite, tf.where(grown, 2.0, 1.0), 0.5)
            self.loss_scale.assign(tf.maximum(self.loss_scale * factor, 1.0))
            self.good_in_row.assign(tf.where(grown, 0, good))


def unit_branches(embeddings, dim):
    """(N, V * C) embeddings of V branches -> a list of V tensors (N, C) of unit rows; V is 1 but for CMC."""
    return [unit(own) for own in tf.split(embeddings, embeddings.shape[1] // dim, axis=1)]


def contrasted(branches):
    """Which branch's queries meet which one's keys: (0, 0) for one branch, else all ordered pairs (CMC, sec. 3.3)."""
    if branches == 1:
        return ((0, 0),)
    return tuple((query, key) for query in range(branches) for key in range(branches) if query != key)


def accuracies(rank):
    """How often the positive scores highest, and among the five highest; `rank` as of `positive_rank`."""
    return {"accuracy": tf.reduce_mean(tf.cast(rank < 1, tf.float32)),
            "accuracy_top5": tf.reduce_mean(tf.cast(rank < 5, tf.float32))}


def feature_std(rows):
    """Mean over the dimensions of the standard deviation of unit rows, times sqrt(C): 1 when they fill the sphere,
    0 when all are alike (collapse)."""
    width = tf.cast(rows.shape[1], rows.dtype)
    return tf.cast(tf.reduce_mean(tf.math.reduce_std(rows, axis=0)) * tf.sqrt(width), tf.float32)


def least_feature_std(branches):
    """`feature_std` of the branch that is nearest to collapse."""
    return tf.reduce_min([feature_std(rows) for rows in branches])
