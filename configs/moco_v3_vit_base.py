"""MoCo v3, ViT-B/16, 300 epochs, batch 4,096: 76.7 % linear top-1 on ImageNet, 83.2 % fine-tuned for 150 epochs
(arXiv:2104.02057 and its code's table).

    moco-tf pretrain --config=moco_v3_vit_base --workdir=runs/moco_v3_vit_base --config.data.path=/data/imagenet

Published on 64 V100 of 32 GB. All but the backbone is moco_v3_vit_small's. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v3_vit_small")
    config.backbone.name = "vit_base"
    return config
