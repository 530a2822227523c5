"""Fine-tuning a ResNet on 1 % of the labels: 60 epochs, the rest as finetune_r50 (arXiv:2002.05709, app. B.5).

    moco-tf finetune --encoder=runs/moco_v2_r50 --config=finetune_r50_1pct

The part is drawn per class, the same in every run; for the published list of ImageNet name TFDS' split instead:
--config.data.name=tfds --config.data.path=imagenet2012_subset/1pct --config.data.fraction=1. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("finetune_r50")
    config.update(dict(epochs=60, data=dict(fraction=0.01)))
    return config
