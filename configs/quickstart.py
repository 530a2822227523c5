"""Quick start: MoCo v2 on the embedded 10,000 images, about two minutes on two CPU cores.

    moco-tf pretrain --config=quickstart --workdir=runs/quickstart
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=12, batch_size=128, bn_group_size=32,
        data=dict(name="embedded"),
        views=dict(name="quickstart", size=28, crop_min=0.2, flip=0.5, brightness=0.4, contrast=0.4, jitter=0.8, blur=0.0),
        backbone=dict(name="resnet", depth=18, width=0.25, stem="cifar"),
        head=dict(name="mlp", hidden_dim=128, dim=64),
        method=dict(name="moco", queue_size=4096, temperature=0.2, momentum=0.99),
        optimizer=dict(name="sgd", lr_per_256=0.12, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="half_cosine", per_step=True, warmup_epochs=0)))
