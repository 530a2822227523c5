"""Transfer of ViT-B to Oxford Flowers-102: 97.7 % (arXiv:2104.02057, table 6).

    moco-tf finetune --encoder=runs/moco_v3_vit_base --config=transfer_vit_flowers

As transfer_vit_cifar10; no mixup and CutMix, weight decay .3, train and validation images together; at batch 1,024
a pass has one step: lower the batch on fewer devices. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("transfer_vit_cifar10")
    config.update(dict(data=dict(path="oxford_flowers102", split="train+validation"),
                       method=dict(mixup=0.0, cutmix=0.0), optimizer=dict(weight_decay=0.3)))
    return config
