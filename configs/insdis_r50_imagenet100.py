"""InsDis, ResNet-50, softmax with 16384 negatives, 240 epochs: 69.1 % linear top-1 on ImageNet-100 (HobbitLong/CMC).

    moco-tf pretrain --config=insdis_r50_imagenet100 --workdir=runs/insdis100 --config.data.path=/data/imagenet

The path is that of the whole ImageNet; other classes are left out. With NCE (--config.method.loss=nce) 53.5 % was published
and withdrawn. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("insdis_r50_softmax")
    config.epochs, config.schedule.milestones = 240, (120, 160, 200)
    config.data.classes = recipe("moco_v2_r50_imagenet100").data.classes
    config.views.crop_min = 0.2
    return config
