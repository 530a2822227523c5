"""Linear classification on frozen features as MoCo v3 does it for ViT-S and ViT-B: learning rate 3 per 256
(arXiv:2104.02057, appendix A, and its code); the rest as linear_v3_resnet.

    moco-tf linear --encoder=runs/moco_v3_vit_small --config=linear_v3_vit

Published with it, ImageNet top-1: 73.2 % (ViT-S), 76.7 % (ViT-B). The feature is the class token behind the last norm.
Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_v3_resnet")
    config.optimizer.lr_per_256 = 3.0
    return config
