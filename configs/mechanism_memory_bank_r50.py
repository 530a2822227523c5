"""The memory bank with InfoNCE, to compare: fig. 3 of arXiv:1911.05722, 58.0 % linear top-1 on ImageNet, 65536 negatives.

    moco-tf pretrain --config=mechanism_memory_bank_r50 --workdir=runs/bank_65536 --config.data.path=/data/imagenet
    moco-tf pretrain --config=mechanism_memory_bank_r50 --config.method.num_negatives=4096 --workdir=runs/bank_4096 ...

Published, by method.num_negatives 256, 512, 1024, 4096, 16384, 65536: 50.0, 52.0, 54.1, 56.5, 57.8, 58.0 %. The draw is shared
by a step's queries: rows of each query's own, 65536 of them, would take 8.6 GB. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("mechanism_moco_r50")
    config.shuffle_bn = "none"
    config.views.name = "insdis"    # v1's operations, one view
    config.method = dict(name="insdis", bank_size=0, loss="softmax", num_negatives=65536, temperature=0.07, momentum=0.5,
                         shared_negatives=True)
    return config
