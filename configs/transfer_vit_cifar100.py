"""Transfer of ViT-B to CIFAR-100: 90.5 % (arXiv:2104.02057, table 6).

    moco-tf finetune --encoder=runs/moco_v3_vit_base --config=transfer_vit_cifar100

As transfer_vit_cifar10; mixup .5. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("transfer_vit_cifar10")
    config.update(dict(data=dict(path="cifar100"), method=dict(mixup=0.5)))
    return config
