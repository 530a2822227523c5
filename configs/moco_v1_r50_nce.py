"""MoCo v1 with NCE in place of InfoNCE, ResNet-50, 200 epochs, ImageNet.

    moco-tf pretrain --config=moco_v1_r50_nce --workdir=runs/moco_nce --config.data.path=/data/imagenet

Z follows its estimates with momentum 0.99, as MoCo's author advises: a Z frozen at the first batch's gave HobbitLong/CMC 11.6 %
on ImageNet-100, which was withdrawn. He puts NCE about 2 points below InfoNCE's 60.6 %. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v1_r50")
    config.method.update(dict(loss="nce", num_images=0, partition_momentum=0.99))
    return config
