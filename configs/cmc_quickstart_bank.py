"""CMC with memory banks on patches of photographs: cmc_quickstart with the softmax over all images.

    moco-tf pretrain --config=cmc_quickstart_bank --config.data.path=patches --workdir=runs/cmc_bank

Measured: not beyond 1 % of retrieval in 8 to 14 epochs at higher rates; at this one not yet.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("cmc_quickstart")
    config.shuffle_bn = "none"
    config.batch_size, config.bn_group_size = 64, 32
    config.views.names = ("query",)
    config.method = dict(name="cmc", bank_size=0, loss="full", temperature=0.07, momentum=0.5)
    config.optimizer.lr_per_256 = 0.01
    return config
