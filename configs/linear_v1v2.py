"""Linear classification on frozen features as MoCo v1 and v2 do it: 100 epochs, learning rate 30
(arXiv:1911.05722, sec. 4.1).

    moco-tf linear --encoder=runs/moco_v2_r50 --config=linear_v1v2

Published with it, ImageNet top-1: 60.6 % (v1), 67.7 % (v2), 71.1 % (v2, 800 epochs). The rate of 30 is per 256 images here;
the reference uses 30 for its batch of 256. With --fast the features are computed once, without augmentation, and the grid
below is trained on them in one pass.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        encoder="", side="query",                   # given by --encoder and --side
        epochs=100, batch_size=256, bn_group_size=0,
        data=dict(name=""),                         # "": the data of the encoder's run
        views=dict(name="train_linear", size=0),    # 0: the encoder's size
        method=dict(name="linear_probe", batch_norm=False),
        optimizer=dict(name="sgd", lr_per_256=30.0, momentum=0.9, weight_decay=0.0),
        schedule=dict(name="steps", milestones=(60, 80), gamma=0.1),
        monitor=dict(every_epochs=1),
        fast=dict(lrs=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), weight_decays=(0.0, 1e-6, 1e-4),
                  epochs=100, batch_size=256, holdout=0.1, batch_norm=False)))
