"""CMC on patches of photographs: luminance against chroma, two narrow ResNet-18, some three minutes on two CPU cores.

    moco-tf data cut PHOTOS patches --side=48 --shorter_side=960
    moco-tf pretrain --config=cmc_quickstart --config.data.path=patches --workdir=runs/cmc

Any folder of colour photographs will do, a dozen or more. View retrieval is across branches: how often, among the held-out
patches, a patch's luminance finds its own chroma, and back. Its negatives are those of the batch, which learns in minutes; a
memory bank (cmc_quickstart_bank) needs many more epochs on so few images, as its rows are an epoch old. Measured: see the README.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        epochs=30, batch_size=256, bn_group_size=128, intra_op_threads=1,
        branches=(("l_to_ab", 1), ("ab_to_l", 2)),
        data=dict(name="folder", holdout=0.1),
        views=dict(name="cmc", size=48, crop_min=1.0, flip=0.0, space="Lab", names=("query", "key")),
        backbone=dict(name="resnet", depth=18, width=0.25, stem="imagenet"),
        head=dict(name="linear", dim=64),
        method=dict(name="end_to_end", temperature=0.1, shared=True),
        optimizer=dict(name="sgd", lr_per_256=0.12, momentum=0.9, weight_decay=1e-4),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=1),
        monitor=dict(every_epochs=10)))
