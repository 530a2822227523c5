"""MoCo v3, ResNet-50, 300 epochs: 72.8 % linear top-1 on ImageNet (arXiv:2104.02057 and its code's table).

    moco-tf pretrain --config=moco_v3_r50_300ep --workdir=runs/moco_v3_r50_300ep --config.data.path=/data/imagenet

Cost: three times moco_v3_r50's. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v3_r50")
    config.epochs = 300
    config.optimizer.lr_per_256 = 0.3
    return config
