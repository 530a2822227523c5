"""Fine-tuning a quick start's encoder on 10 % of the labels, 1,000 images: under a minute on two CPU cores.

    moco-tf finetune --encoder=runs/quickstart --config=finetune_quickstart
    moco-tf finetune --encoder=random:quickstart --config=finetune_quickstart --workdir=runs/from_random

For any of the quick starts' encoders, ResNet or ViT. Measured: see the README.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        encoder="", side="query",
        epochs=20, batch_size=64, bn_group_size=0, intra_op_threads=1,
        data=dict(name="", fraction=0.1),
        views=dict(name="train_linear", size=0, crop_min=0.7),
        method=dict(name="fine_tuning"),
        optimizer=dict(name="adamw", lr_per_256=2e-3, weight_decay=0.05, exclude=("bias$", "gamma", "beta")),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=2),
        monitor=dict(every_epochs=5)))
