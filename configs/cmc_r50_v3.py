"""CMC, two ResNet-50 of two widths on Lab, 200 epochs, ImageNet (HobbitLong/CMC).

    moco-tf pretrain --config=cmc_r50_v3 --workdir=runs/cmc_r50_v3 --config.data.path=/data/imagenet

189 million parameters. The best published ResNet of CMC has 68.4 % linear top-1; the released weights of this width were trained
with FastAutoAugment, which is not here. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_r50_v1")
    config.backbone.width = 2.0
    return config
