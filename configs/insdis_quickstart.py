"""InsDis on the embedded 10,000 grey images, softmax over all of them, a narrow ResNet-18, some two minutes on two cores.

    moco-tf pretrain --config=insdis_quickstart --workdir=runs/insdis

Measured: see the README.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("quickstart")
    config.shuffle_bn = "none"
    config.views.names = ("query",)
    config.method = dict(name="insdis", bank_size=0, loss="full", temperature=0.1, momentum=0.5)
    return config
