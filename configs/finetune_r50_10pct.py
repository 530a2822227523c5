"""Fine-tuning a ResNet on 10 % of the labels: 30 epochs, the rest as finetune_r50 (arXiv:2002.05709, app. B.5).

    moco-tf finetune --encoder=runs/moco_v2_r50 --config=finetune_r50_10pct

The part is drawn per class, the same in every run; for the published list of ImageNet name TFDS' split instead:
--config.data.name=tfds --config.data.path=imagenet2012_subset/10pct --config.data.fraction=1. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("finetune_r50")
    config.update(dict(epochs=30, data=dict(fraction=0.1)))
    return config
