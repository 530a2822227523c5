"""MoCo v1, ResNeXt-50 32x8d (46 M parameters): 63.9 % linear top-1 on ImageNet (read off arXiv:1911.05722's figure).

    moco-tf pretrain --config=moco_v1_rx50 --workdir=runs/moco_v1_rx50 --config.data.path=/data/imagenet

Cost unpublished. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v1_r50")
    config.backbone.groups, config.backbone.width_per_group = 32, 8
    return config
