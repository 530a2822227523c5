"""CMC with queues and momentum encoders on patches of photographs, two narrow ResNet-18, minutes on two CPU cores.

    moco-tf pretrain --config=cmc_moco_quickstart --config.data.path=patches --workdir=runs/cmc_moco

Measured: 3.6 % of retrieval after 8 epochs with crops of 0.8 at least; not yet as it stands.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_quickstart")
    config.batch_size, config.bn_group_size = 64, 32
    config.method = dict(name="moco", queue_size=1024, temperature=0.1, momentum=0.99)
    return config
