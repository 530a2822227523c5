"""Fine-tuning ViT-S end to end by DeiT's recipe (arXiv:2104.02057, table 5): 81.4 % ImageNet top-1.

    moco-tf finetune --encoder=runs/moco_v3_vit_small --config=finetune_vit_small

finetune_vit_base for 300 epochs, DeiT's default; the paper states the number of epochs for ViT-B only. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("finetune_vit_base")
    config.epochs = 300
    return config
