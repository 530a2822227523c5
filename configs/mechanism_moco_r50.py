"""MoCo's mechanism, to compare: fig. 3 of arXiv:1911.05722, ResNet-50, 200 epochs, 60.6 % linear top-1 on ImageNet.

    moco-tf pretrain --config=mechanism_moco_r50 --workdir=runs/moco_65536 --config.data.path=/data/imagenet
    moco-tf pretrain --config=mechanism_moco_r50 --config.method.queue_size=4096 --workdir=runs/moco_4096 ...
    moco-tf pretrain --config=mechanism_moco_r50 --config.method.queue_size=4096 --config.method.momentum=0.99 ...

Published, by method.queue_size 256, 512, 1024, 4096, 16384, 65536: 54.7, 56.4, 57.5, 59.0, 60.4, 60.6 %. By method.momentum 0,
0.9, 0.99, 0.999, 0.9999, with 4096 keys: fails, 55.2, 57.8, 59.0, 58.9 %. Fewer keys than images in a batch want a smaller
batch_size. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    return recipe("moco_v1_r50")
