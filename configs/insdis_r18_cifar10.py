"""InsDis for CIFAR-10, ResNet-18, softmax over all images, 200 epochs (arXiv:1805.01978; zhirongw/lemniscate.pytorch).

    tfds build cifar10 && moco-tf pretrain --config=insdis_r18_cifar10 --workdir=runs/insdis_cifar10

Its script drops the learning rate at epoch 120 for the first time, though it says 80. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=128, bn_group_size=0, shuffle_bn="none",
        data=dict(name="tfds", path="cifar10", eval_split="test"),
        views=dict(name="insdis_cifar", size=32),
        backbone=dict(name="resnet", depth=18, width=1, stem="cifar"),
        head=dict(name="linear", dim=128),
        method=dict(name="insdis", bank_size=0, num_negatives=0, temperature=0.1, momentum=0.5),    # 0: all images
        optimizer=dict(name="sgd", lr_per_256=0.06, momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="steps", milestones=(120, 160), gamma=0.1),
        monitor=dict(every_epochs=1, k=200, temperature=0.1, bank=50000, queries=10000, features="embedding")))
