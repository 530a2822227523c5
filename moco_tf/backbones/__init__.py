"""Backbones: functional models, images (B, S, S, channels) to features (B, D)."""

from moco_tf.backbones.alexnet import alexnet
from moco_tf.backbones.resnet import resnet
from moco_tf.backbones.vit import vit, vit_base, vit_conv_base, vit_conv_small, vit_small

BACKBONES = {"resnet": resnet, "alexnet": alexnet, "vit": vit, "vit_small": vit_small, "vit_base": vit_base,
             "vit_conv_small": vit_conv_small, "vit_conv_base": vit_conv_base}
