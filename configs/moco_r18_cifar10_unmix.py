"""MoCo with Un-Mix for CIFAR-10, ResNet-18, symmetric, 1000 epochs: 92.25 % kNN, 90.49 % without (szq0214/Un-Mix).

    tfds build cifar10 && moco-tf pretrain --config=moco_r18_cifar10_unmix --workdir=runs/cifar10_unmix

Asymmetric (--config.method.symmetric=false): 91.34 %, 89.11 % without. CIFAR-100 (--config.data.path=cifar100): 68.83 %,
65.49 % without. The paper is arXiv:2003.05438. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("moco_v2_r18_cifar10")
    config.epochs, config.shuffle_bn = 1000, "cross_replica"
    config.method.symmetric = True
    config.mixture = dict(name="unmix", probability=0.5, beta=1.0)
    config.monitor.every_epochs = 1
    return config
