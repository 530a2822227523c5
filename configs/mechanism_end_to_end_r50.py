"""The end-to-end mechanism, to compare: fig. 3 of arXiv:1911.05722, 57.3 % linear top-1 on ImageNet, batches of 1024.

    moco-tf pretrain --config=mechanism_end_to_end_r50 --workdir=runs/end_to_end --config.data.path=/data/imagenet
    moco-tf pretrain --config=mechanism_end_to_end_r50 --config.batch_size=256 --workdir=runs/end_to_end_256 ...

Published, by batch_size 256, 512, 1024: 54.9, 56.4, 57.3 %. The learning rate grows with the batch (without it, 2 points less
at 1024). Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("mechanism_moco_r50")
    config.batch_size = 1024
    config.method = dict(name="end_to_end", temperature=0.07)
    return config
