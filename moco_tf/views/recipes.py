"""The papers' augmentations, and the only place where their strengths stand.

    recipe = RECIPES["moco_v2"](size=224)
    views = recipe.apply(image, seed)     # {"query": (224, 224, 3) uint8, "key": ...}

All randomness is a function of the seed.
"""

import tensorflow as tf

from moco_tf.views import ops

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CIFAR = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


class View:
    """One way to draw a view: a crop, resized, then stages in order.

    Args:
        size: side of the view.
        crop: (height, width, seed) -> Span of rows and of columns; `ops.random_crop` or `ops.central_crop`.
        stages: (planes, seed) -> planes each.
        xla: whether XLA compiles the stages. Without it they take several times as long and give the same levels.
    """

    def __init__(self, size, crop, stages=(), xla=True):
        self.size, self.crop, self.stages = size, crop, tuple(stages)
        self._finish = tf.function(self._stages_of_image, jit_compile=xla)

    def __call__(self, image, seed):
        """(H, W, 3) uint8 of any size, (2,) int32 -> (size, size, 3) uint8."""
        seeds = ops.split(seed, 1 + len(self.stages))
        shape = tf.shape(image)
        rows, columns = self.crop(shape[0], shape[1], seeds[0])
        resized = ops.resample(image, rows, columns, self.size)
        resized = tf.ensure_shape(tf.cast(ops.nearest(resized), tf.uint8), [self.size, self.size, 3])
        return self._finish(resized, seeds) if self.stages else resized

    def of_shape(self, image, seed):
        """As a call, in operations that XLA can compile because `image` has a static shape."""
        seeds = ops.split(seed, 1 + len(self.stages))
        rows, columns = self.crop(tf.constant(image.shape[0]), tf.constant(image.shape[1]), seeds[0])
        return ops.to_image(self._run(ops.nearest(ops.resample_planes(image, rows, columns, self.size)), seeds))

    def _stages_of_image(self, image, seeds):
        return ops.to_image(self._run(ops.to_planes(image), seeds))

    def _run(self, planes, seeds):
        for number, stage in enumerate(self.stages, start=1):
            planes = stage(planes, seeds[number])
        return planes


class Recipe:
    """Named views of one image, and how to normalise them.

    Attributes:
        views: {name: f(image, seed)}.
        mean, std: of red, green and blue on [0, 1].
    """

    def __init__(self, views, mean, std, xla=True):
        self.views, self.mean, self.std = dict(views), mean, std
        self.apply_batch = tf.function(self._apply_batch, jit_compile=xla)
        self.apply_batch.__doc__ = self._apply_batch.__doc__

    def apply(self, image, seed):
        """(H, W, 3) uint8, (2,) int32 -> {name: (S, S, 3) uint8}; each view draws for itself."""
        seeds = tf.unstack(ops.split(seed, len(self.views)))
        return {name: view(image, s) for (name, view), s in zip(self.views.items(), seeds)}

    def _apply_batch(self, images, seeds):
        """(n, H, W, 3) uint8 of static shape, (n, 2) int32 -> {name: (n, S, S, 3) uint8}, as `apply` of each.

        One call for all: with small images the calls would otherwise take longer than the work.
        """
        def one(example):
            image, seed = example
            per_view = tf.unstack(ops.split(seed, len(self.views)))
            return {name: view.of_shape(image, s) for (name, view), s in zip(self.views.items(), per_view)}

        return tf.map_fn(one, (images, seeds), fn_output_signature={
            name: tf.TensorSpec([view.size, view.size, 3], tf.uint8) for name, view in self.views.items()})


def _alike(view, statistics, xla):
    """Query and key drawn alike."""
    return Recipe({"query": view, "key": view}, **statistics, xla=xla)


def moco_v1(size=224, crop_min=0.2, xla=True):
    """MoCo v1 (arXiv:1911.05722, sec. 3.4, and its code): grey before jitter, jitter always."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_grayscale(0.2),
        ops.random_jitter(0.4, 0.4, 0.4, 0.4),
        ops.random_flip(0.5)], xla)
    return _alike(view, IMAGENET, xla)


def moco_v2(size=224, crop_min=0.2, xla=True):
    """MoCo v2 (arXiv:2003.04297, sec. 3 and its code): milder hue, grey after jitter, blur."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_jitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        ops.random_grayscale(0.2),
        ops.random_blur((0.1, 2.0), probability=0.5),
        ops.random_flip(0.5)], xla)
    return _alike(view, IMAGENET, xla)


def insdis(size=224, crop_min=0.2, xla=True):
    """Instance discrimination (arXiv:1805.01978 and its code): v1's stages, and one view that is the query."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_grayscale(0.2),
        ops.random_jitter(0.4, 0.4, 0.4, 0.4),
        ops.random_flip(0.5)], xla)
    return Recipe({"query": view}, **IMAGENET, xla=xla)


def cifar(size=32, crop_min=0.08, xla=True):
    """MoCo's CIFAR-10 notebook (facebookresearch/moco): flip first, no blur."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_flip(0.5),
        ops.random_jitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        ops.random_grayscale(0.2)], xla)
    return _alike(view, CIFAR, xla)


def quickstart(size=28, crop_min=0.2, flip=0.5, brightness=0.4, contrast=0.4, jitter=0.8, blur=0.0, xla=True):
    """For small grey images, where saturation and hue do nothing; `flip`, `jitter` and `blur` are probabilities."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_jitter(brightness, contrast, 0.0, 0.0, probability=jitter),
        ops.random_blur((0.1, 2.0), probability=blur),
        ops.random_flip(flip)], xla)
    return _alike(view, IMAGENET, xla)


def train_linear(size=224, crop_min=0.08, xla=True):
    """Training a linear classifier on frozen features: crop and flip."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [ops.random_flip(0.5)], xla)
    return Recipe({"image": view}, **IMAGENET, xla=xla)


def evaluation(size=224, xla=True):
    """Shorter side to 256/224 of the size, centre crop; the seed is not used."""
    return Recipe({"image": View(size, ops.central_crop(size, size * 256 // 224), (), xla)}, **IMAGENET, xla=xla)


RECIPES = {
    "moco_v1": moco_v1, "moco_v2": moco_v2, "insdis": insdis, "cifar": cifar, "quickstart": quickstart,
    "train_linear": train_linear, "eval": evaluation,
}
