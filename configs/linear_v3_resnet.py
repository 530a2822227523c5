"""Linear classification on frozen features as MoCo v3 does it for ResNet-50: 90 epochs, learning rate 0.1 per 256
(arXiv:2104.02057, appendix A, and its code); batch 1,024.

    moco-tf linear --encoder=runs/moco_v3_r50 --config=linear_v3_resnet

Published with it, ImageNet top-1: 68.9 % (100 epochs of pre-training), 72.8 % (300), 74.6 % (1,000). Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_v1v2")
    config.update(dict(epochs=90, batch_size=1024, optimizer=dict(lr_per_256=0.1)))
    config.schedule = dict(name="half_cosine")
    return config
