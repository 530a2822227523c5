"""MoCo on Imagewoof (ten breeds of dogs), as moco_v2_r18_imagenette: no figure was published.

    moco-tf pretrain --config=moco_v2_r18_imagewoof --workdir=runs/imagewoof --config.data.path=/data/imagewoof2

9,025 training images in v2 of the data set. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v2_r18_imagenette")
    return config
