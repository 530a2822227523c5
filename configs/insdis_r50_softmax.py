"""InsDis, ResNet-50, softmax with 16384 negatives, 200 epochs: 58.5 % linear top-1 on ImageNet (HobbitLong/CMC).

    moco-tf pretrain --config=insdis_r50_softmax --workdir=runs/insdis_r50_softmax --config.data.path=/data/imagenet

4096 negatives: 57.1 %. ImageNet-100, 240 epochs, crop_min=0.2, milestones (120, 160, 200): 69.1 %. The published runs
had 4 GPUs, each with BatchNorm of its own over 32 images. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=128, bn_group_size=32, shuffle_bn="none",
        data=dict(name="folder"),
        views=dict(name="insdis", size=224, crop_min=0.08),
        backbone=dict(name="resnet", depth=50, width=1, groups=1, width_per_group=64, stem="imagenet"),
        head=dict(name="linear", dim=128),
        method=dict(name="insdis", bank_size=0, loss="softmax", num_negatives=16384, temperature=0.07, momentum=0.5,
                    shared_negatives=False),
        optimizer=dict(name="sgd", lr_per_256=0.06, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="steps", milestones=(120, 160), gamma=0.1)))
