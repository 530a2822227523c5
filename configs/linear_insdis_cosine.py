"""linear_insdis along half a cosine, an option of CMC's code (HobbitLong/CMC), down to 0.0008 of the rate.

    moco-tf linear --encoder=runs/insdis_r50 --config=linear_insdis_cosine

ImageNet-100: --config.optimizer.lr_per_256=10 --config.schedule.minimum=0.008. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_insdis")
    # DeiT's curve without its warm-up ends at a minimum, and is an epoch late; here the first epoch is number 1.
    config.schedule = dict(name="deit", minimum=0.0008 * config.optimizer.lr_per_256, first_epoch=2)
    return config
