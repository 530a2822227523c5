"""MoCo v3, ResNet-50, 1,000 epochs: 74.6 % linear top-1 on ImageNet (arXiv:2104.02057 and its code's table).

    moco-tf pretrain --config=moco_v3_r50_1000ep --workdir=runs/moco_v3_r50_1000ep --config.data.path=/data/imagenet

Cost: ten times moco_v3_r50's. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v3_r50")
    config.epochs = 1000
    config.method.momentum = 0.996
    config.optimizer.lr_per_256 = 0.3
    config.optimizer.weight_decay = 1.5e-6
    return config
