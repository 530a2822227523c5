"""CMC, two ResNet-50 of half a width on Lab, softmax with 4096 negatives, 200 epochs, ImageNet (HobbitLong/CMC).

    moco-tf pretrain --config=cmc_r50_v1 --workdir=runs/cmc_r50_v1 --config.data.path=/data/imagenet

12 million parameters. Published for ResNet-50, of a width not said: 58.1 %, later about 63 % linear top-1. The code's runs had
4 GPUs, each with BatchNorm of its own over 32 images. Mixed precision costs half a point to one there. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=128, bn_group_size=32, shuffle_bn="none",
        branches=(("l_to_ab", 1), ("ab_to_l", 2)),
        data=dict(name="folder"),
        views=dict(name="cmc", size=224, crop_min=0.08, space="Lab"),
        backbone=dict(name="resnet", depth=50, width=0.5, stem_channels=64),
        head=dict(name="linear", dim=128),
        method=dict(name="cmc", bank_size=0, loss="softmax", num_negatives=4096, temperature=0.07, momentum=0.5,
                    partition_momentum=1.0, shared_negatives=False),
        optimizer=dict(name="sgd", lr_per_256=0.06, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="steps", milestones=(120, 160), gamma=0.1)))
