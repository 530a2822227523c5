"""MoCo v2, ResNet-50, 800 epochs: 71.1 % linear top-1 on ImageNet (arXiv:2003.04297, table 3).

    moco-tf pretrain --config=moco_v2_r50_800ep --workdir=runs/moco_v2_r50_800ep --config.data.path=/data/imagenet

Cost: four times moco_v2_r50's. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v2_r50")
    config.epochs = 800
    return config
