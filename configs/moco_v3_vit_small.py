"""MoCo v3, ViT-S/16 (12 heads), 300 epochs, batch 4,096: 73.2 % linear top-1 on ImageNet, 81.4 % fine-tuned
(arXiv:2104.02057 and its code's table).

    moco-tf pretrain --config=moco_v3_vit_small --workdir=runs/moco_v3_vit_small --config.data.path=/data/imagenet

Published on 32 GPUs, in float16 (here --config.precision=bfloat16 or float16). Its learning rate is 1.5e-4 for 256
images. The patch convolution stays at its random start, which keeps the training of transformers stable (sec. 4).
Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=300, batch_size=4096, bn_group_size=-1, shuffle_bn="none",
        data=dict(name="folder"),
        views=dict(name="moco_v3", size=224, crop_min=0.08),
        backbone=dict(name="vit_small", freeze_patch=True),
        head=dict(name="projector", layers=3, hidden_dim=4096, dim=256),
        predictor=dict(layers=2, hidden_dim=4096, last_bn=True),
        method=dict(name="moco_v3", temperature=0.2, momentum=0.99, momentum_schedule="cosine"),
        optimizer=dict(name="adamw", lr_per_256=1.5e-4, weight_decay=0.1),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=40)))
