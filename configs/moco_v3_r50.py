"""MoCo v3, ResNet-50, 100 epochs: 68.9 % linear top-1 on ImageNet (arXiv:2104.02057 and its code's table).

    moco-tf pretrain --config=moco_v3_r50 --workdir=runs/moco_v3_r50 --config.data.path=/data/imagenet

Published on 16 GPUs of two machines, in float16 (here --config.precision=bfloat16 or float16). Its learning rate is .6
for 256 images, 9.6 for the 4,096 of the recipe. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=100, batch_size=4096, bn_group_size=-1, shuffle_bn="none",
        data=dict(name="folder"),
        views=dict(name="moco_v3", size=224, crop_min=0.2),
        backbone=dict(name="resnet", depth=50, width=1, groups=1, width_per_group=64, stem="imagenet",
                      zero_init_residual=True),
        head=dict(name="projector", layers=2, hidden_dim=4096, dim=256),
        predictor=dict(layers=2, hidden_dim=4096, last_bn=False),
        method=dict(name="moco_v3", temperature=1.0, momentum=0.99, momentum_schedule="cosine"),
        optimizer=dict(name="lars", lr_per_256=0.6, momentum=0.9, weight_decay=1e-6),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=10)))
