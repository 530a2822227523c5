"""MoCo on Imagenette, ResNet-18, batch 256, K 8192, temperature .05: no figure was published.

    moco-tf pretrain --config=moco_v2_r18_imagenette --workdir=runs/imagenette --config.data.path=/data/imagenette2

Follows a public write-up on training MoCo from little data: its head of three layers (100, 50, 25), queue, temperature
and momentum. It names neither optimizer, nor epochs, views or image size; here they are MoCo v2's. Its learning rate .001
goes with that unnamed optimizer; with SGD we keep MoCo's .03. Its leaks (no shuffling BN on one device, fixed 256 rows
taken out of the queue, a softmax that overflows) are not copied. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=200, batch_size=256, bn_group_size=32,
        data=dict(name="folder"),
        views=dict(name="moco_v2", size=128),
        backbone=dict(name="resnet", depth=18, width=1, stem="imagenet"),
        head=dict(name="mlp", hidden_dim=(100, 50), dim=25),
        method=dict(name="moco", queue_size=8192, temperature=0.05, momentum=0.999),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, weight_decay=1e-6),
        schedule=dict(name="half_cosine")))
