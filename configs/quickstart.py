"""Quick start: MoCo v2 on the embedded 10,000 grey images, a narrow ResNet-18, about two minutes on two CPU cores.

    moco-tf pretrain --config=quickstart --workdir=runs/quickstart

Made for the little time: many small steps; views enlarged to 56 pixels, so that the network's maps do not shrink to one
value; a queue of 16 steps; mild crops and strong brightness and contrast, the only colour operations that grey images have.
Measured: see the README.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=20, batch_size=64, bn_group_size=32, intra_op_threads=1,
        data=dict(name="embedded"),
        views=dict(name="quickstart", size=56, crop_min=0.7, flip=0.5, brightness=0.8, contrast=0.8, jitter=0.8, blur=0.0),
        backbone=dict(name="resnet", depth=18, width=0.25, stem="imagenet"),
        head=dict(name="mlp", hidden_dim=128, dim=64),
        method=dict(name="moco", queue_size=1024, temperature=0.1, momentum=0.99),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=5e-4),
        schedule=dict(name="half_cosine", per_step=True),
        monitor=dict(every_epochs=10)))
