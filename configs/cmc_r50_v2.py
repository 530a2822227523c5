"""CMC, two ResNet-50 of one width on Lab, 200 epochs, ImageNet (HobbitLong/CMC).

    moco-tf pretrain --config=cmc_r50_v2 --workdir=runs/cmc_r50_v2 --config.data.path=/data/imagenet

47.5 million parameters. The best published ResNet of CMC has 68.4 % linear top-1; the released weights of this width were trained
with FastAutoAugment, which is not here. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_r50_v1")
    config.backbone.width = 1.0
    return config
