"""The papers' augmentations, and the only place where their strengths stand.

    recipe = RECIPES["moco_v2"](size=224)
    views = recipe.apply(image, seed)     # {"query": (224, 224, 3) uint8, "key": ...}

All randomness is a function of the seed.
"""

import functools

import tensorflow as tf

from moco_tf.errors import UsageError
from moco_tf.views import colour, ops, randaugment

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
FASHION_MNIST = dict(mean=(0.286,) * 3, std=(0.353,) * 3)
CIFAR = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))


class View:
    """One way to draw a view: a crop, resized, then stages in order.

    Args:
        size: side of the view.
        crop: an `ops.Crop`, of `ops.random_crop` or `ops.central_crop`.
        stages: `ops.Stage`s, or what can be drawn and called as they.
        interpolation: of the resize, "bilinear" or "bicubic", antialiased.
        normalize: levels, planes (C, size, size) uint8 -> image (size, size, C), float32; None: the view is of uint8.

    Raises:
        UsageError: another interpolation.
    """

    def __init__(self, size, crop, stages=(), interpolation="bilinear", normalize=None):
        if interpolation not in ops.FILTERS:
            raise UsageError(f"An interpolation must be one of {', '.join(ops.FILTERS)}. Received: {interpolation!r}.")
        self.size, self.crop, self.stages, self.interpolation = size, crop, tuple(stages), interpolation
        self.dtype, self._to_image = tf.float32 if normalize else tf.uint8, normalize or ops.to_image

    def normalized(self, normalize):
        """The same view with that as its last stage."""
        return View(self.size, self.crop, self.stages, self.interpolation, normalize)

    @property
    def counts(self):
        """How many numbers the crop and each stage take."""
        return [self.crop.count, *(stage.count for stage in self.stages)]

    def draw(self, seed):
        """All numbers of a view, (n,) float32, from its seed (2,)."""
        # In a loop, and so many for each: XLA takes .1 s for every generator that it compiles.
        drawn = tf.map_fn(lambda own: ops.uniform(own, [max(self.counts)]), ops.split(seed, len(self.counts)),
                          fn_output_signature=tf.float32)
        return tf.concat([numbers[:count] for numbers, count in zip(tf.unstack(drawn), self.counts)], axis=0)

    def finish(self, columns, numbers):
        """Does the stages of one view: (size, C, size) uint8 columns of its crop, (n,) -> (size, size, C) of `dtype`."""
        return self._to_image(self._changed(tf.transpose(columns, [1, 2, 0]), numbers, lambda stage: stage))

    def finish_rows(self, columns, numbers):
        """As `finish`, of rows one by one: (n, size, C, size), (n, k) -> (n, size, size, C)."""
        return tf.map_fn(lambda row: self.finish(*row), (columns, numbers), fn_output_signature=tf.TensorSpec(
            [self.size, self.size, columns.shape[2]], self.dtype))

    def finish_batch(self, columns, numbers):
        """As `finish`, of a batch: (B, size, C, size), (B, n) -> (B, size, size, C) uint8, equal to the level."""
        return ops.to_image(self._changed(tf.transpose(columns, [2, 0, 3, 1]), numbers, lambda stage: stage.of_batch))

    def crop_small(self, image, numbers):
        """(H, W, C) uint8 of static shape -> the crop's (size, C, size) uint8 columns; XLA can compile it."""
        frame = self.crop.frame(tf.constant(list(image.shape[:2])), numbers[:self.crop.count])
        planes = ops.resample_planes(image, frame, self.size, self.interpolation)
        return tf.transpose(ops.to_levels(planes, self.interpolation), [2, 0, 1])

    def _changed(self, planes, numbers, function_of):
        _, *each = tf.split(numbers, self.counts, axis=-1)
        for stage, own in zip(self.stages, each):
            planes = function_of(stage)(planes, own)
        return planes


class Recipe:
    """Named views of one image, and how to normalise them.

    Views are made in three steps: `draw` all numbers, `crop` an image, `finish` the crops; `apply` is all of them.
    Only the middle one depends on the image's shape. XLA compiles the others for several images at once, because a call
    takes as long as a stage does.

    Attributes:
        views: {name: View}; all of one size.
        mean, std: of each channel on [0, 1]; None where there is a `space`.
        xla: whether XLA compiles. Without it stages take several times as long and give the same levels.
        space: of `colour.SPACES`, whose constants normalise; None: the channels stay what they are.
        channels: of the images it takes, 3 where a stage or the space needs colours; None: any number.
        cropped: whether views are handed out as crops, (S, C, S) uint8 columns, and beside them the numbers of which
            `finish_batch` makes views.

    Raises:
        UsageError: no such space; `cropped`, and a stage that batches cannot go through.
    """

    def __init__(self, views, mean=None, std=None, xla=True, space=None, channels=3, cropped=False):
        if space is not None:
            colour.require_space(space)
        if cropped and not all(hasattr(stage, "of_batch") for view in views.values() for stage in view.stages):
            raise UsageError("data.device_views takes views whose stages a device can do for a batch. Received: views with "
                             "RandAugment. Leave data.device_views out.")
        self.views, self.mean, self.std, self.xla = dict(views), mean, std, xla
        self.space, self.channels, self.cropped = space, channels, cropped
        compiled = functools.partial(tf.function, autograph=False, jit_compile=xla)
        self.draw, self.apply_batch = compiled(self._draw), compiled(self._apply_batch)
        self.draw.__doc__, self.apply_batch.__doc__ = self._draw.__doc__, self._apply_batch.__doc__
        self._finish = {view: compiled(view.finish_rows) for view in self._names_of_views()}
        self._finish_batch = {view: compiled(view.finish_batch) for view in self._names_of_views()}

    def apply(self, image, seed):
        """(H, W, C) uint8, (2,) int32 -> {name: (S, S, C) of the views' dtype}; each view draws for itself.

        Where the recipe is `cropped`: {name: (S, C, S) uint8, numbers_of(name): (n,) float32}.
        """
        numbers = {name: drawn[0] for name, drawn in self.draw(seed[None]).items()}
        crops = {**self.crop(image, numbers), **numbers}
        if self.cropped:
            return crops
        finished = self.finish({name: value[None] for name, value in crops.items()})
        return {name: view[0] for name, view in finished.items()}

    def crop(self, image, numbers):
        """(H, W, C) uint8 of any size, {numbers_of(name): (n,)} -> {name: (S, C, S) uint8}: columns, channels, rows.

        In plain operations, as XLA would compile for every shape anew.
        """
        crops = {}
        for alike in dict.fromkeys((view.crop, view.interpolation) for view in self.views.values()):
            names = [name for name, view in self.views.items() if (view.crop, view.interpolation) == alike]
            crop, interpolation = alike
            frames = crop.frame(tf.shape(image)[:2], tf.stack([numbers[numbers_of(name)][:crop.count] for name in names]))
            resized = ops.resample(image, frames, self.views[names[0]].size, interpolation)
            crops.update(zip(names, (ops.to_levels(columns, interpolation) for columns in resized)))
        return {name: crops[name] for name in self.views}

    def finish(self, batch):
        """{name: (n, S, C, S) uint8, numbers_of(name): (n, k)} -> {name: (n, S, S, C)}, image by image: on the host.

        Other entries of the batch pass.
        """
        return self._finished(batch, self._finish)

    def finish_batch(self, batch):
        """As `finish`, in operations on whole batches, and to levels: on a device."""
        return self._finished(batch, self._finish_batch)

    def mixture_seed(self, seed):
        """The seed of a mixture, from an image's: the next after those of the views."""
        return ops.split(seed, len(self.views) + 1)[-1]

    def pair(self):
        """A recipe of two views, to retrieve one by the other: this one, or its only view drawn twice."""
        if len(self.views) > 1:
            return self
        (name, view), = self.views.items()
        return self._with({name: view, f"{name}_again": view})

    def normalize(self, images, dtype=tf.float32):
        """(B, S, S, C) uint8 -> what the encoder takes, of `dtype`; the arithmetic is at least float32."""
        if self.space:
            exact = tf.float64 if tf.as_dtype(dtype) == tf.float64 else tf.float32
            return tf.cast(colour.normalized(images, self.space, -1, exact), dtype)
        return ops.normalize(images, self.mean, self.std, dtype)

    def normalized(self):
        """The recipe whose views come normalised, float32, from the same draws: the last stage of each."""
        twins = {view: view.normalized(self._normalize_planes) for view in set(self.views.values())}
        return self._with({name: twins[view] for name, view in self.views.items()})

    def crops(self):
        """The `cropped` recipe of the same draws."""
        return self._with(self.views, cropped=True)

    def require_channels(self, channels):
        """Raises UsageError where the recipe does not take images of so many channels."""
        if self.channels not in (None, channels):
            raise UsageError(f"The views take images of {self.channels} channels. Received: {channels} channels. "
                             'Set data.channels, or take the views "channels", which crop and flip images of any.')

    def _normalize_planes(self, planes):
        planes = tf.cast(planes, tf.float32)
        if self.space:
            return ops.interleave(colour.normalized(planes, self.space))
        return tf.transpose(ops.normalize_planes(planes, self.mean, self.std), [1, 2, 0])

    def _with(self, views, cropped=False):
        return Recipe(views, self.mean, self.std, self.xla, self.space, self.channels, cropped)

    def _names_of_views(self):
        """{view: the names that are drawn by it}: what is compiled for one name serves the others."""
        names = {}
        for name, view in self.views.items():
            names.setdefault(view, []).append(name)
        return names

    def _draw(self, seeds):
        """(n, 2) int32, of n images -> {numbers_of(name): (n, k)} that their views take."""
        own = tf.map_fn(lambda seed: ops.split(seed, len(self.views)), seeds)
        seeds_of = dict(zip(self.views, tf.unstack(own, axis=1)))
        drawn = {}
        for view, names in self._names_of_views().items():
            numbers = tf.map_fn(view.draw, tf.concat([seeds_of[name] for name in names], 0),
                                fn_output_signature=tf.TensorSpec([sum(view.counts)]))
            drawn.update(zip(map(numbers_of, names), tf.split(numbers, len(names))))
        return drawn

    def _finished(self, batch, by):
        ours = {key for name in self.views for key in (name, numbers_of(name))}
        return {**{key: value for key, value in batch.items() if key not in ours},
                **{name: by[view](batch[name], batch[numbers_of(name)]) for name, view in self.views.items()}}

    def _apply_batch(self, images, seeds):
        """(n, H, W, C) uint8 of static shape, (n, 2) int32 -> {name: (n, S, S, C)}, as `apply` of each.

        One call for all: with small images the calls would otherwise take longer than the work.
        """
        def one(example):
            image, numbers = example
            crops = {name: view.crop_small(image, numbers[numbers_of(name)]) for name, view in self.views.items()}
            if self.cropped:
                return {**crops, **numbers}
            return {name: view.finish(crops[name], numbers[numbers_of(name)]) for name, view in self.views.items()}

        channels = images.shape[-1]
        signature = {name: tf.TensorSpec([view.size, channels, view.size], tf.uint8) if self.cropped else
                     tf.TensorSpec([view.size, view.size, channels], view.dtype) for name, view in self.views.items()}
        if self.cropped:
            signature.update({numbers_of(name): tf.TensorSpec([sum(view.counts)]) for name, view in self.views.items()})
        return tf.map_fn(one, (images, self._draw(seeds)), fn_output_signature=signature)


def numbers_of(name):
    """What the numbers of a view are called in a batch."""
    return f"{name}_numbers"


def _alike(view, statistics, xla):
    """Query and key drawn alike."""
    return Recipe({"query": view, "key": view}, **statistics, xla=xla)


def moco_v1(size=224, crop_min=0.2, xla=True):
    """MoCo v1 (arXiv:1911.05722, sec. 3.4, and its code): grey before jitter, jitter always."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_grayscale(0.2),
        ops.random_jitter(0.4, 0.4, 0.4, 0.4),
        ops.random_flip(0.5)])
    return _alike(view, IMAGENET, xla)


def moco_v2(size=224, crop_min=0.2, xla=True):
    """MoCo v2 (arXiv:2003.04297, sec. 3 and its code): milder hue, grey after jitter, blur."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_jitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        ops.random_grayscale(0.2),
        ops.random_blur((0.1, 2.0), probability=0.5),
        ops.random_flip(0.5)])
    return _alike(view, IMAGENET, xla)


def insdis(size=224, crop_min=0.2, names=("query",), xla=True):
    """Instance discrimination (arXiv:1805.01978 and its code): v1's stages, and one view, the query.

    `names`: ("image",) for a linear probe on such views.
    """
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_grayscale(0.2),
        ops.random_jitter(0.4, 0.4, 0.4, 0.4),
        ops.random_flip(0.5)])
    return Recipe(dict.fromkeys(names, view), **IMAGENET, xla=xla)


def insdis_cifar(size=32, crop_min=0.2, xla=True):
    """Instance discrimination's CIFAR-10 script (zhirongw/lemniscate.pytorch): jitter before grey, and no flip."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_jitter(0.4, 0.4, 0.4, 0.4),
        ops.random_grayscale(0.2)])
    return Recipe({"query": view}, **CIFAR, xla=xla)


def cifar(size=32, crop_min=0.08, xla=True):
    """MoCo's CIFAR-10 notebook (facebookresearch/moco): flip first, no blur."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_flip(0.5),
        ops.random_jitter(0.4, 0.4, 0.4, 0.1, probability=0.8),
        ops.random_grayscale(0.2)])
    return _alike(view, CIFAR, xla)


def moco_v3(size=224, crop_min=0.08, xla=True):
    """MoCo v3 (arXiv:2104.02057, and its code): two unlike views, after BYOL, each both query and key."""
    crop = ops.random_crop(size, (crop_min, 1.0))

    def view(*unlike):
        return View(size, crop, [
            ops.random_jitter(0.4, 0.4, 0.2, 0.1, probability=0.8),
            ops.random_grayscale(0.2),
            *unlike,
            ops.random_flip(0.5)])

    return Recipe({"view_1": view(ops.random_blur((0.1, 2.0), probability=1.0)),
                   "view_2": view(ops.random_blur((0.1, 2.0), probability=0.1), ops.random_solarize(0.2))},
                  **IMAGENET, xla=xla)


def quickstart(size=28, crop_min=0.2, brightness=0.4, contrast=0.4, jitter=0.8, blur=0.0, flip=0.5,
               names=("query", "key"), xla=True):
    """For small grey images, which have no saturation and no hue; `jitter`, `blur` and `flip` are probabilities.

    `names` are those that the method knows its two views by: ("view_1", "view_2") for MoCo v3.
    """
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_jitter(brightness, contrast, probability=jitter),
        ops.random_blur((0.1, 2.0), probability=blur),
        ops.random_flip(flip)])
    return Recipe(dict.fromkeys(names, view), **FASHION_MNIST, xla=xla)


def cmc(size=224, crop_min=0.2, space="Lab", flip=0.5, names=("query",), xla=True):
    """Contrastive multiview coding (arXiv:1906.05849, sec. 4, and its code): crop, flip, then a colour space, whose
    channels the encoder's branches share out. The halves of a view are of one crop.

    `space` is one of `colour.SPACES`; the paper's are "Lab" and "YCbCr". `names`: two, ("query", "key"), draw two
    crops, as a momentum encoder needs them.
    """
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [ops.random_flip(flip)])
    return Recipe(dict.fromkeys(names, view), xla=xla, space=space)


def channels(size=224, mean=(), std=(), crop_min=0.2, flip=0.5, names=("query",), xla=True):
    """Images of any number of channels, such as RGB and depth in one array: crop and flip.

    `mean` and `std` have a number for each channel, on [0, 1]; `names` as in `cmc`.
    """
    if not mean or len(mean) != len(std):
        raise UsageError('The views "channels" need views.mean and views.std, a number for each channel of the images. '
                         f"Received: mean {tuple(mean)}, std {tuple(std)}.")
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [ops.random_flip(flip)])
    return Recipe(dict.fromkeys(names, view), mean, std, xla, channels=len(mean))


def train_linear(size=224, crop_min=0.08, xla=True):
    """Training a linear classifier on frozen features: crop and flip."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [ops.random_flip(0.5)])
    return Recipe({"image": view}, **IMAGENET, xla=xla, channels=None)


def transfer(size=224, crop_min=0.05, xla=True):
    """Fine-tuning on small data sets (MoCo v3's transfer, arXiv:2104.02057, and its code): crop and flip."""
    return train_linear(size, crop_min, xla)


def deit(size=224, crop_min=0.08, xla=True):
    """Training a vision transformer end to end (DeiT, arXiv:2012.12877, table 9, and its code, which leaves out its
    colour jitter beside RandAugment). Erasing and mixing follow on the device: `views/mixture.py`."""
    view = View(size, ops.random_crop(size, (crop_min, 1.0)), [
        ops.random_flip(0.5),
        randaugment.RandAugment(operations_each=2, probability=0.5, magnitude=9.0, deviation=0.5, fill=(124, 116, 104)),
    ], "bicubic")
    return Recipe({"image": view}, **IMAGENET, xla=xla)


def evaluation(size=224, shorter_side=None, interpolation="bilinear", xla=True):
    """Resize to `shorter_side` (256/224 of the size; the size itself leaves small images whole), then centre crop.

    DeiT's `interpolation` is "bicubic", all others' "bilinear". The seed is not used. Normalise with the constants of
    the recipe that the encoder was trained with.
    """
    crop = ops.central_crop(size, shorter_side or size * 256 // 224)
    return Recipe({"image": View(size, crop, (), interpolation)}, **IMAGENET, xla=xla, channels=None)


RECIPES = {
    "moco_v1": moco_v1, "moco_v2": moco_v2, "moco_v3": moco_v3, "insdis": insdis, "insdis_cifar": insdis_cifar,
    "cifar": cifar, "cmc": cmc, "channels": channels,
    "quickstart": quickstart, "train_linear": train_linear, "transfer": transfer, "deit": deit, "eval": evaluation,
}
