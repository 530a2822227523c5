"""MoCo v1, ResNet-50 with every channel times 2 (94 M parameters): 65.4 % linear top-1 (arXiv:1911.05722).

    moco-tf pretrain --config=moco_v1_r50_w2 --workdir=runs/moco_v1_r50_w2 --config.data.path=/data/imagenet

Cost unpublished. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v1_r50")
    config.backbone.width = 2
    return config
