"""A run of seconds with memory banks: CMC by NCE, its branches the channels of small grey images."""
from moco_tf.config import recipe


def get_config():
    config = recipe("smoke")
    config.update(batch_size=250, bn_group_size=125, shuffle_bn="none", branches=(("one", 1), ("two", 2)))
    config.data.fraction = 0.2
    config.views = dict(name="quickstart", size=8, names=("query",), xla=False)
    config.method = dict(name="cmc", bank_size=0, loss="nce", num_negatives=64, temperature=0.2, momentum=0.5,
                         partition_momentum=0.9, shared_negatives=True, shard_bank=False)
    config.epochs = 4
    config.log.tensorboard = False
    config.monitor.update(bank=300, queries=100)
    config.checkpoint = dict(every_steps=10, keep=2)
    return config
