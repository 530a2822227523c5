"""The papers' views by other libraries, as a measure of ours: cases for `timing.in_turns`. TensorFlow is not imported.

    in_turns({"torchvision": (torchvision, dict(files=files, recipe="moco_v2", size=224, ...))}, rounds=5)

Each loads files of images in the worker processes of a PyTorch DataLoader, and draws the views of `RECIPES` as the
papers' own code does: crop and resize, colours, blur, flip, then float32, normalised. The strengths are the papers',
written down again: `moco_tf/views/recipes.py` imports TensorFlow.
"""

import functools
import importlib
import itertools
import random

from moco_tf.bench.timing import timed
from moco_tf.errors import UsageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAB_MIDDLE, LAB_HALF_RANGE = (50.0, 6.025, -6.6895), (50.0, 92.208, 101.1675)
BLUR = (0.1, 2.0)      # sigma in pixels
QUEUED = 2             # batches that a worker makes ahead

# The stages between crop and tensor, in order, of each view: (name, probability, strengths).
GREY, FLIP = ("grayscale", 0.2), ("flip", 0.5)
V1 = (GREY, ("jitter", 1.0, 0.4, 0.4, 0.4, 0.4), FLIP)
V2 = (("jitter", 0.8, 0.4, 0.4, 0.4, 0.1), GREY, ("blur", 0.5), FLIP)
V3 = (("jitter", 0.8, 0.4, 0.4, 0.2, 0.1), GREY)
RECIPES = {
    "moco_v1": (V1, V1), "insdis": (V1,), "moco_v2": (V2, V2), "cmc": ((FLIP, ("lab", 1.0)),),
    "moco_v3": ((*V3, ("blur", 1.0), FLIP), (*V3, ("blur", 0.1), ("solarize", 0.2), FLIP)),
}
CROP_MIN = {**dict.fromkeys(RECIPES, 0.2), "moco_v3": 0.08}    # least area of a crop


def arguments(names, config):
    """What the peers of these names take for the views of a config: recipe, size, crop_min.

    Raises:
        UsageError: no such peer, or one that is not installed; views that the peers do not draw.
    """
    views = config.views
    for name in names:
        if name not in PEERS:
            raise UsageError(f"--vs takes {', '.join(PEERS)}. Received: {name}.")
        try:
            for module in NEEDED[name] + (("skimage",) if views.name == "cmc" and name == "torchvision" else ()):
                importlib.import_module(module)
        except ImportError as error:
            raise UsageError(f"--vs={name} needs pip install {PACKAGES[name]}. Received: {error}.") from None
    if views.name not in RECIPES or views.get("space", "Lab") != "Lab":
        raise UsageError(f"The peers draw the views {', '.join(RECIPES)} (cmc in Lab). Received: {views.name}. Leave "
                         "--vs out.")
    return dict(recipe=views.name, size=views.get("size", 224), crop_min=views.get("crop_min", CROP_MIN[views.name]))


def torchvision(files, recipe, size, crop_min, batch_size, batches, workers):
    """torchvision's transforms on Pillow's images, as in the papers' code; Lab by scikit-image, as in CMC's."""
    from PIL import features
    import PIL
    import torchvision as library

    simd = "-SIMD" if "post" in PIL.__version__ else ""
    facts = {"made by": f"torchvision {library.__version__}, Pillow{simd} {PIL.__version__}, "
                        f"libjpeg-turbo {features.version('libjpeg_turbo')}"}
    views = [torchvision_view(stages, size, crop_min) for stages in RECIPES[recipe]]
    yield from _turns(Views(files, open_pillow, views), facts, batch_size, batches, workers)


def albumentations(files, recipe, size, crop_min, batch_size, batches, workers):
    """albumentations on OpenCV's arrays; its resize does not antialias."""
    import albumentations as library
    import cv2

    facts = {"made by": f"albumentations {library.__version__}, OpenCV {cv2.__version__}"}
    views = [albumentations_view(stages, size, crop_min) for stages in RECIPES[recipe]]
    yield from _turns(Views(files, open_opencv, views), facts, batch_size, batches, workers)


PEERS = {"torchvision": torchvision, "albumentations": albumentations}
NEEDED = {"torchvision": ("torch", "torchvision", "PIL"), "albumentations": ("torch", "albumentations", "cv2")}
PACKAGES = {"torchvision": "torch torchvision pillow scikit-image",
            "albumentations": "torch albumentations opencv-python-headless"}


def _turns(views, facts, batch_size, batches, workers):
    """Rounds of so many batches, without those that were made before the round began."""
    from torch.utils.data import DataLoader

    loader = iter(DataLoader(views, batch_sampler=Endless(len(views), batch_size), num_workers=workers,
                             prefetch_factor=QUEUED, worker_init_fn=one_thread))

    def draw(count):
        for _ in range(count):
            next(loader)

    draw(1)
    yield {**facts, "workers": workers}
    while True:
        draw((QUEUED + 1) * workers)
        yield timed(functools.partial(draw, batches), batches * batch_size)


class Views:
    """A DataLoader's data set: the views of each file."""

    def __init__(self, files, load, views):
        self.files, self.load, self.views = files, load, views

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = self.load(self.files[index])
        return [view(image) for view in self.views]


class Endless:
    """Batches of indexes, in one drawn order after the other."""

    def __init__(self, size, batch_size):
        self.size, self.batch_size = size, batch_size

    def __iter__(self):
        draw = random.Random(0)
        endless = itertools.chain.from_iterable(draw.sample(range(self.size), self.size) for _ in itertools.count())
        while True:
            yield list(itertools.islice(endless, self.batch_size))


def one_thread(worker):
    """The workers are as many as the cores; OpenCV would start as many threads in each."""
    try:
        import cv2
    except ImportError:
        return
    cv2.setNumThreads(0)


# --- Pillow and torchvision ---


def open_pillow(file):
    from PIL import Image

    with open(file, "rb") as content:
        return Image.open(content).convert("RGB")


def torchvision_view(stages, size, crop_min):
    """Pillow image -> (3, size, size) float32, normalised."""
    from torchvision import transforms

    made = {"grayscale": lambda p: transforms.RandomGrayscale(p), "flip": lambda p: transforms.RandomHorizontalFlip(p),
            "jitter": lambda p, *strengths: sometimes(transforms.ColorJitter(*strengths), p),
            "blur": lambda p: sometimes(pillow_blur, p), "solarize": lambda p: sometimes(pillow_solarize, p),
            "lab": lambda p: skimage_lab}
    lab = any(name == "lab" for name, *_ in stages)
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(crop_min, 1.0)),
        *(made[name](*numbers) for name, *numbers in stages),
        transforms.ToTensor(),
        transforms.Normalize(LAB_MIDDLE, LAB_HALF_RANGE) if lab else transforms.Normalize(MEAN, STD)])


def sometimes(change, probability):
    from torchvision import transforms

    return change if probability == 1.0 else transforms.RandomApply([change], probability)


def pillow_blur(image):
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(random.uniform(*BLUR)))


def pillow_solarize(image):
    from PIL import ImageOps

    return ImageOps.solarize(image)


def skimage_lab(image):
    import numpy as np
    from skimage import color

    return color.rgb2lab(np.asarray(image)).astype(np.float32)


# --- OpenCV and albumentations ---


def open_opencv(file):
    import cv2

    return cv2.cvtColor(cv2.imread(file), cv2.COLOR_BGR2RGB)


def albumentations_view(stages, size, crop_min):
    """(H, W, 3) uint8 -> (3, size, size) float32, normalised."""
    import albumentations
    from albumentations.pytorch import ToTensorV2

    made = {"grayscale": lambda p: albumentations.ToGray(p=p), "flip": lambda p: albumentations.HorizontalFlip(p=p),
            "jitter": lambda p, *strengths: albumentations.ColorJitter(*strengths, p=p),
            "blur": lambda p: albumentations.GaussianBlur(blur_limit=0, sigma_limit=BLUR, p=p),
            "solarize": lambda p: albumentations.Solarize(threshold_range=(0.5, 0.5), p=p),
            "lab": lambda p: albumentations.Lambda(image=opencv_lab, p=p)}
    lab = any(name == "lab" for name, *_ in stages)
    normalize = (albumentations.Normalize(LAB_MIDDLE, LAB_HALF_RANGE, max_pixel_value=1.0) if lab else
                 albumentations.Normalize(MEAN, STD))
    return AlbumentationsView(albumentations.Compose([
        albumentations.RandomResizedCrop((size, size), scale=(crop_min, 1.0)),
        *(made[name](*numbers) for name, *numbers in stages), normalize, ToTensorV2()]))


class AlbumentationsView:
    """A composition that takes and gives an image."""

    def __init__(self, compose):
        self.compose = compose

    def __call__(self, image):
        return self.compose(image=image)["image"]


def opencv_lab(image, **_):
    import cv2
    import numpy as np

    return cv2.cvtColor(np.float32(image) * np.float32(1 / 255), cv2.COLOR_RGB2Lab)
