"""MoCo v3, ViT-S/16, 300 epochs, batch 1,024 for one machine with 8 GPUs: no figure was published.

    moco-tf pretrain --config=moco_v3_vit_small_1node --workdir=runs/moco_v3_vit_small --config.data.path=/data/imagenet

From the configurations of MoCo v3's code; all but the batch is moco_v3_vit_small's. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v3_vit_small")
    config.batch_size = 1024
    return config
