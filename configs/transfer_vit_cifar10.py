"""Transfer of ViT-B to CIFAR-10: 98.9 % (arXiv:2104.02057, table 6).

    moco-tf finetune --encoder=runs/moco_v3_vit_base --config=transfer_vit_cifar10

100 epochs at 3e-4 for 512 images, three of them warming up; images enlarged to 224 pixels, crop and flip only, no erasing,
no repeated augmentation; mixing and smoothing as in finetune_vit_base. Published with 128 images on each of 8 GPUs.
TFDS' cifar10 must be prepared, or add --config.data.download. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("finetune_vit_base")
    config.update(dict(
        epochs=100, batch_size=1024,
        data=dict(name="tfds", path="cifar10", eval_split="test", repeats=1),
        views=dict(name="transfer", size=224), evaluation=dict(interpolation="bilinear", shorter_side=256),
        method=dict(erasing=0.0), optimizer=dict(lr_per_256=1.5e-4, weight_decay=0.1), schedule=dict(warmup_epochs=3)))
    return config
