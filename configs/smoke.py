"""Smoke test: every part of MoCo v2, tiny, in seconds on a CPU. Tests start from it.

    moco-tf pretrain --config=smoke --workdir=runs/smoke
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=1, batch_size=512, bn_group_size=128,
        data=dict(name="embedded"),
        views=dict(name="quickstart", size=16),
        backbone=dict(name="resnet", depth=18, width=0.0625, stem="cifar"),
        head=dict(name="mlp", hidden_dim=32, dim=16),
        method=dict(name="moco", queue_size=1024, temperature=0.2, momentum=0.99),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="half_cosine"),
        log=dict(every_steps=1),
        monitor=dict(every_epochs=0, bank=1000, queries=500)))
