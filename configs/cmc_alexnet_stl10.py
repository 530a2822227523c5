"""CMC for STL-10, two AlexNet halves on 64 pixels, its 100,000 unlabelled images.

    tfds build stl10 && moco-tf pretrain --config=cmc_alexnet_stl10 --workdir=runs/cmc_stl10

HobbitLong/CMC names temperature 0.1 and 4096 negatives for STL-10; its network, crops and schedule for it were not released,
so that those here are ImageNet's. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_alexnet")
    config.data = dict(name="tfds", path="stl10", split="unlabelled", eval_split="test")
    config.views.size = 64
    config.method.update(dict(num_negatives=4096, temperature=0.1))
    return config
