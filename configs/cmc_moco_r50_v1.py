"""CMC with queues and momentum encoders, which its authors' code does not have: MoCo on the branches of cmc_r50_v1.

    moco-tf pretrain --config=cmc_moco_r50_v1 --workdir=runs/cmc_moco --config.data.path=/data/imagenet

Each branch's query of one crop meets the other branch's keys of another crop. Settings are MoCo v1's. No figure is known.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_r50_v1")
    config.batch_size, config.shuffle_bn = 256, "input"
    config.views.update(dict(crop_min=0.2, names=("query", "key")))
    config.optimizer.lr_per_256 = 0.03
    config.method = dict(name="moco", queue_size=65536, temperature=0.07, momentum=0.999)
    return config
