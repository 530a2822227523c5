"""MoCo v3, ViT-S with a convolutional stem and one block less, 300 epochs: no figure was published.

    moco-tf pretrain --config=moco_v3_vit_conv_small --workdir=runs/moco_v3_conv --config.data.path=/data/imagenet

The model is of MoCo v3's code (stem: arXiv:2106.14881), which has no recipe for it; this is moco_v3_vit_small's. The
stem needs no freezing. Not trained by us.
"""
from ml_collections import ConfigDict

from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v3_vit_small")
    config.backbone = ConfigDict(dict(name="vit_conv_small"))
    return config
