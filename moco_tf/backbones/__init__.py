"""Backbones: functional models, images (B, S, S, channels) to features (B, D)."""

from moco_tf.backbones.resnet import resnet

BACKBONES = {"resnet": resnet}
