"""Fine-tuning ViT-B end to end by DeiT's recipe, as MoCo v3 does it, 150 epochs: 83.2 % ImageNet top-1
(arXiv:2104.02057, table 5; arXiv:2012.12877, table 9).

    moco-tf finetune --encoder=runs/moco_v3_vit_base --config=finetune_vit_base

AdamW at 5e-4 for 512 images; one value an epoch, from 1e-6 over five epochs, down to 1e-5, neither of which scales with the batch.
RandAugment, repeated augmentation (3 views of a third of the images an epoch), mixup or CutMix for every batch, erasing,
label smoothing, stochastic depth. Positions and patch convolution train. A moving average of the weights is kept; accuracies
are those of the weights themselves, as published. Published in float16 (here --config.precision=bfloat16 or float16).
Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        encoder="", side="query",
        epochs=150, batch_size=1024, bn_group_size=0,
        data=dict(name="", repeats=3),
        views=dict(name="deit", size=0),
        evaluation=dict(interpolation="bicubic"),
        backbone=dict(drop_path=0.1, trainable_positions=True),
        method=dict(name="fine_tuning", stddev=0.02, mixup=0.8, cutmix=1.0, smoothing=0.1, erasing=0.25, average=0.99996),
        optimizer=dict(name="adamw", lr_per_256=2.5e-4, weight_decay=0.05,
                       exclude=("bias$", "gamma", "beta", "pos_embed", "cls_token")),
        schedule=dict(name="deit", warmup_epochs=5, start=1e-6, minimum=1e-5),
        monitor=dict(every_epochs=1)))
