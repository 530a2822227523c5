"""Quick start of MoCo v3: a tiny vision transformer on the embedded 10,000 grey images, minutes on two CPU cores.

    moco-tf pretrain --config=moco_v3_vit_tiny_quickstart --workdir=runs/moco_v3_vit_tiny

Patches of 7 pixels, so that 28 x 28 images have 16 of them; heads, loss, AdamW, schedules and the frozen patch
convolution are MoCo v3's, made for the little time: two blocks, small heads, a large learning rate, a small temperature,
milder crops and colours than the ResNet's quick start.
Measured: see the README.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=30, batch_size=64, bn_group_size=-1, shuffle_bn="none", intra_op_threads=1,
        data=dict(name="embedded"),
        views=dict(name="quickstart", names=("view_1", "view_2"), size=28, crop_min=0.85, flip=0.5, brightness=0.8,
                   contrast=0.8, jitter=0.4, blur=0.0),
        backbone=dict(name="vit", dim=64, depth=2, heads=2, patch=7, freeze_patch=True),
        head=dict(name="projector", layers=3, hidden_dim=256, dim=64),
        predictor=dict(layers=2, hidden_dim=256, last_bn=True),
        method=dict(name="moco_v3", temperature=0.1, momentum=0.99, momentum_schedule="cosine"),
        optimizer=dict(name="adamw", lr_per_256=8e-3, weight_decay=0.1),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=1),
        monitor=dict(every_epochs=15)))
