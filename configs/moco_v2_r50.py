"""MoCo v2, ResNet-50, 200 epochs: 67.7 % linear top-1 on ImageNet (arXiv:2003.04297; 67.5 +- .1 in five trials).

    moco-tf pretrain --config=moco_v2_r50 --workdir=runs/moco_v2_r50 --config.data.path=/data/imagenet

Cost published: 53 hours on 8 V100. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=256, bn_group_size=32,
        data=dict(name="folder"),
        views=dict(name="moco_v2", size=224),
        backbone=dict(name="resnet", depth=50, width=1, groups=1, width_per_group=64, stem="imagenet"),
        head=dict(name="mlp", hidden_dim=2048, dim=128),
        method=dict(name="moco", queue_size=65536, temperature=0.2, momentum=0.999),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="half_cosine")))
