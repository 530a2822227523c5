"""CMC, two ResNet-50 of half a width on YCbCr, 240 epochs: 75.8 % linear top-1 on ImageNet-100 (HobbitLong/CMC).

    moco-tf pretrain --config=cmc_r50_v1_imagenet100 --workdir=runs/cmc100 --config.data.path=/data/imagenet

The path is that of the whole ImageNet; other classes are left out. Softmax with 4096 negatives; with NCE
(--config.method.loss=nce) 74.5 % was published and withdrawn. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_r50_v1")
    config.epochs, config.schedule.milestones = 240, (120, 160, 200)
    config.data.classes = recipe("moco_v2_r50_imagenet100").data.classes
    config.views.update(dict(crop_min=0.2, space="YCbCr"))
    return config
