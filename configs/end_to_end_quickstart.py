"""The end-to-end mechanism on the embedded 10,000 grey images, a narrow ResNet-18, some two minutes on two cores.

    moco-tf pretrain --config=end_to_end_quickstart --workdir=runs/end_to_end

Not measured yet.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("quickstart")
    config.batch_size = 256
    config.method = dict(name="end_to_end", temperature=0.1)
    return config
