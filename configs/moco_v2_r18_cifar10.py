"""MoCo for CIFAR-10, ResNet-18, 200 epochs: 82.6 % kNN (the authors' CIFAR notebook; 400 epochs 86.3, 800 88.7).

    tfds build cifar10 && moco-tf pretrain --config=moco_v2_r18_cifar10 --workdir=runs/cifar10

The figures are of its asymmetric loss, which is the one here. It splits BatchNorm into 8 groups of the 512 images, and has
neither blur nor an MLP head. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=512, bn_group_size=64,
        data=dict(name="tfds", path="cifar10", eval_split="test"),
        views=dict(name="cifar", size=32),
        backbone=dict(name="resnet", depth=18, width=1, stem="cifar"),
        head=dict(name="linear", dim=128),
        method=dict(name="moco", queue_size=4096, temperature=0.1, momentum=0.99),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="half_cosine", first_epoch=1),    # the notebook counts from 1: the last epoch runs at lr 0
        monitor=dict(every_epochs=10, k=200, temperature=0.1, bank=50000, queries=10000, features="embedding")))
