"""CMC, two AlexNet halves on Lab, NCE with 16384 negatives, 200 epochs: 42.6 % linear top-1 on ImageNet (its code).

    moco-tf pretrain --config=cmc_alexnet --workdir=runs/cmc_alexnet --config.data.path=/data/imagenet

The paper is arXiv:1906.05849, the code HobbitLong/CMC; the figure is of an earlier version of it, whose epochs are not
said. YCbCr: --config.views.space=YCbCr. Its runs split BatchNorm over GPUs, of a number not said. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=256, bn_group_size=64, shuffle_bn="none",
        branches=(("l_to_ab", 1), ("ab_to_l", 2)),
        data=dict(name="folder"),
        views=dict(name="cmc", size=224, crop_min=0.2, space="Lab"),
        backbone=dict(name="alexnet"),
        head=dict(name="linear", dim=128),
        method=dict(name="cmc", bank_size=0, loss="nce", num_negatives=16384, temperature=0.07, momentum=0.5,
                    partition_momentum=1.0, shared_negatives=False),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="steps", milestones=(120, 160), gamma=0.1)))
