"""Fine-tuning a ResNet on all labels: 30 epochs of SGD with Nesterov momentum, crop and flip only, no weight decay.

    moco-tf finetune --encoder=runs/moco_v2_r50 --config=finetune_r50

The settings are those of SimCLR's semi-supervised protocol (arXiv:2002.05709, app. B.5); the cosine is ours. The figure
published for MoCo v1, ResNet-50, all of ImageNet's labels, is 77.0 %, by another schedule. Not trained by us.
"""
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        encoder="", side="query",                   # given by --encoder and --side
        epochs=30, batch_size=256, bn_group_size=0,
        data=dict(name="", fraction=1.0),           # "": the data of the encoder's run
        views=dict(name="train_linear", size=0),    # 0: the encoder's size
        method=dict(name="fine_tuning"),
        optimizer=dict(name="sgd", lr_per_256=0.05, momentum=0.9, nesterov=True, weight_decay=0.0),
        schedule=dict(name="half_cosine", per_step=True),
        monitor=dict(every_epochs=1)))
