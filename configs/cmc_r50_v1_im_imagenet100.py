"""CMC with image mixture (IM) on ImageNet-100, 600 epochs: 79.5 % linear top-1, 78.5 % without (arXiv:2003.05438).

    moco-tf pretrain --config=cmc_r50_v1_im_imagenet100 --workdir=runs/cmc100_im --config.data.path=/data/imagenet

The figures are read off a chart of szq0214/CMC_with_Image_Mixture, which does not say the loss and the colour space; those
here are of cmc_r50_v1_imagenet100. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_r50_v1_imagenet100")
    config.epochs, config.schedule.milestones = 600, (360, 480, 540)
    config.views.crop_min = 0.1
    config.mixture = dict(name="im")
    return config
