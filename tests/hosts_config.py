"""A run of seconds: MoCo v2 on a tiny transformer, which is soon traced, and views without XLA, which is slow to compile."""
from moco_tf.config import recipe


def get_config():
    config = recipe("smoke")
    config.update(batch_size=250, bn_group_size=25)
    config.views = dict(name="quickstart", size=8, xla=False)
    config.backbone = dict(name="vit", dim=16, depth=1, heads=2, patch=4)
    config.method.queue_size = 500
    config.log.tensorboard = False
    config.monitor.update(bank=300, queries=100)
    config.checkpoint = dict(every_steps=10, keep=2)
    return config
