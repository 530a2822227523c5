"""MoCo v2 with Un-Mix, ResNet-50, 200 epochs: 68.6 % linear top-1 on ImageNet, 67.5 % without (arXiv:2003.05438).

    moco-tf pretrain --config=moco_v2_r50_unmix --workdir=runs/unmix --config.data.path=/data/imagenet

800 epochs: 71.8 %, 71.1 % without. The published line of szq0214/Un-Mix: whole mixtures and pasted boxes alike often. On 4
GPUs its authors advise batches of 128. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v2_r50")
    config.mixture = dict(name="unmix", probability=0.5, beta=1.0)
    return config
