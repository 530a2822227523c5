"""CMC, two ResNet-101 of two widths on Lab, 200 epochs, ImageNet (HobbitLong/CMC).

    moco-tf pretrain --config=cmc_r101_v3 --workdir=runs/cmc_r101_v3 --config.data.path=/data/imagenet

340 million parameters. Published for ResNet-101, of a width not said: 60.1 %, later about 64 %. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_r50_v1")
    config.backbone.update(dict(depth=101, width=2.0))
    return config
