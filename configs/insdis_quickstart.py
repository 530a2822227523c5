"""InsDis on 2,000 of the embedded grey images, softmax over all, a narrow ResNet-18, some two minutes on two cores.

    moco-tf pretrain --config=insdis_quickstart --workdir=runs/insdis

The rows of a memory bank are an epoch old, so that the encoder must move little in an epoch: few steps in each, and a third of
the quick start's learning rate. At three times the rate, and at this one on all 10,000 images, nothing was learned in this time.
Measured: see the README.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("quickstart")
    config.epochs, config.shuffle_bn = 80, "none"
    config.data.fraction = 0.2
    config.views.names = ("query",)
    config.method = dict(name="insdis", bank_size=0, loss="full", temperature=0.07, momentum=0.5)
    config.optimizer.lr_per_256 = 0.01
    config.monitor.every_epochs = 20
    return config
