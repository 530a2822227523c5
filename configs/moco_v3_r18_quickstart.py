"""Quick start of MoCo v3: a narrow ResNet-18 on the embedded 10,000 grey images, minutes on two CPU cores.

    moco-tf pretrain --config=moco_v3_r18_quickstart --workdir=runs/moco_v3_r18

Views, image size and network are the quick start's; heads, loss, LARS and schedules are MoCo v3's, made for the little
time: small heads, a small temperature, a momentum encoder that follows faster.
Measured: see the README.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=8, batch_size=64, bn_group_size=-1, shuffle_bn="none", intra_op_threads=1,
        data=dict(name="embedded"),
        views=dict(name="quickstart", names=("view_1", "view_2"), size=56, crop_min=0.7, flip=0.5, brightness=0.8,
                   contrast=0.8, jitter=0.8, blur=0.0),
        backbone=dict(name="resnet", depth=18, width=0.25, stem="imagenet", zero_init_residual=True),
        head=dict(name="projector", layers=2, hidden_dim=256, dim=64),
        predictor=dict(layers=2, hidden_dim=256, last_bn=False),
        method=dict(name="moco_v3", temperature=0.1, momentum=0.99, momentum_schedule="cosine"),
        optimizer=dict(name="lars", lr_per_256=8.0, momentum=0.9, weight_decay=1e-6),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=1),
        monitor=dict(every_epochs=4)))
