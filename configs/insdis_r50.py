"""InsDis, ResNet-50, NCE with 4096 negatives, 200 epochs: 46.8 % 1-NN on ImageNet (zhirongw/lemniscate.pytorch).

    moco-tf pretrain --config=insdis_r50 --workdir=runs/insdis_r50 --config.data.path=/data/imagenet

The paper is arXiv:1805.01978. HobbitLong/CMC has 56.5 % linear top-1 with batch_size=128, optimizer.lr_per_256=0.06 and
views.crop_min=0.08. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=256, bn_group_size=32, shuffle_bn="none",
        data=dict(name="folder"),
        views=dict(name="insdis", size=224, crop_min=0.2),
        backbone=dict(name="resnet", depth=50, width=1, groups=1, width_per_group=64, stem="imagenet"),
        head=dict(name="linear", dim=128),
        method=dict(name="insdis", bank_size=0, loss="nce", num_negatives=4096, temperature=0.07, momentum=0.5,
                    partition_momentum=1.0, shared_negatives=False),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="steps", milestones=(120, 160), gamma=0.1),
        monitor=dict(k=200, temperature=0.07, features="embedding")))
