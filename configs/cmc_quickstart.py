"""CMC on patches of photographs: luminance against chroma, two narrow ResNet-18, about three minutes on two CPU cores.

    moco-tf data cut PHOTOS patches && moco-tf pretrain --config=cmc_quickstart --config.data.path=patches --workdir=runs/cmc

Any folder of colour photographs will do, some dozens of them. View retrieval is across branches here: of the held-out
patches, how often a patch's luminance finds its own chroma, and back.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=20, batch_size=64, bn_group_size=32, shuffle_bn="none", intra_op_threads=1,
        branches=(("l_to_ab", 1), ("ab_to_l", 2)),
        data=dict(name="folder", holdout=0.1),
        views=dict(name="cmc", size=32, crop_min=0.6, space="Lab"),
        backbone=dict(name="resnet", depth=18, width=0.25, stem="cifar"),
        head=dict(name="linear", dim=64),
        method=dict(name="cmc", bank_size=0, loss="full", temperature=0.1, momentum=0.5),
        optimizer=dict(name="sgd", lr_per_256=0.12, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="half_cosine", per_step=True),
        monitor=dict(every_epochs=5)))
