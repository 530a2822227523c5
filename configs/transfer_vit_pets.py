"""Transfer of ViT-B to Oxford-IIIT Pets: 93.2 % (arXiv:2104.02057, table 6).

    moco-tf finetune --encoder=runs/moco_v3_vit_base --config=transfer_vit_pets

As transfer_vit_cifar10; no CutMix, no stochastic depth. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("transfer_vit_cifar10")
    config.update(dict(data=dict(path="oxford_iiit_pet"), method=dict(cutmix=0.0), backbone=dict(drop_path=0.0)))
    return config
