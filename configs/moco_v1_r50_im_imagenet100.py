"""MoCo with image mixture (IM) on ImageNet-100, ResNet-50, 600 epochs: 78.7 % linear top-1, 77.5 % without
(arXiv:2003.05438).

    moco-tf pretrain --config=moco_v1_r50_im_imagenet100 --workdir=runs/moco100_im --config.data.path=/data/imagenet

The figures are read off a chart of szq0214/CMC_with_Image_Mixture, whose MoCo this is: 16384 keys, batches of 128 in
BatchNorm groups of 32. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v1_r50")
    config.epochs, config.schedule.milestones = 600, (360, 480, 540)
    config.batch_size, config.optimizer.lr_per_256 = 128, 0.06
    config.data.classes = recipe("moco_v2_r50_imagenet100").data.classes
    config.views.crop_min = 0.1
    config.method.queue_size = 16384
    config.mixture = dict(name="im")
    return config
