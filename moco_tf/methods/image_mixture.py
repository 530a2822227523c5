"""Un-Mix (arXiv:2003.05438): any method's loss, and the same loss on mixed queries, weighted by what is in them."""

import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.views import ops
from moco_tf.views.image_mixture import mixture_box
from moco_tf.views.mixture import beta as ratio_from, mix, paste, ratio_of


def unmixed(method, probability=0.5, beta=1.0, seed=0):
    """The class of method with Un-Mix: batches are mixed with themselves reversed, by one ratio for the whole batch.

    Row i of a mixture holds image i of this replica by the ratio r and image N - 1 - i by 1 - r. The loss becomes
    L(queries) + r L(mixed) + (1 - r) L(mixed, reversed), so that it is about twice as high. Only queries see mixtures:
    keys and memories are of whole images. All replicas mix by the same ratio and box.

    Args:
        method: a subclass of `Method`.
        probability: that a batch is mixed whole, mixup's way; else a box is pasted.
        beta: the ratio is drawn from Beta(beta, beta).
        seed: of the draws.

    Raises:
        UsageError: a probability or a beta that cannot be.
    """
    if not 0 <= probability <= 1 or beta <= 0:
        raise UsageError("Un-Mix takes a mixture.probability from 0 to 1 and a mixture.beta above 0. Received: "
                         f"probability {probability}, beta {beta}.")

    class UnMix(method):
        def contrastive_loss(self, views, keys):
            losses, outputs = super().contrastive_loss(views, keys)
            if "noted" in outputs:    # the Z of NCE is that of whole images
                keys = {**keys, "noted": outputs["noted"]}
            mixture, ratio = self.draw_mixture(views[self.query_names[0]].shape)
            mixtures = self.encode_queries(self.mixed(views, mixture))
            own, _ = self.compare(mixtures, keys)
            partners, _ = self.compare([tf.reverse(rows, [0]) for rows in mixtures], keys)
            ratio = tf.cast(ratio, losses.dtype)
            return losses + ratio * own + (1.0 - ratio) * partners, outputs

        def draw_mixture(self, shape):
            """A function images -> mixed images, and the ratio, for views of this shape at this step."""
            _, height, width, _ = shape
            key = tf.stack([seed, tf.cast(self.optimizer.iterations, tf.int32)])
            numbers = ops.uniform(ops.split(key, 1)[0], [5])    # the key itself is that of the keys' permutation
            whole, drawn = numbers[0] < probability, ratio_from(numbers[1:3], beta)
            box = mixture_box(numbers[3:], drawn, height, width)

            def mixture(images):
                return tf.cond(whole, lambda: tf.cast(mix(images, drawn), images.dtype), lambda: paste(images, box))

            return mixture, tf.where(whole, drawn, ratio_of(box, height, width))

        def chance_loss(self, batch_size):
            return 2.0 * super().chance_loss(batch_size)

    UnMix.__name__ = f"UnMix{method.__name__}"
    return UnMix
