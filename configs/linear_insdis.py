"""Linear classification on one layer of InsDis' or MoCo's ResNet-50, as CMC's code has it: layer 6, pooled features,
60 epochs, learning rate 30 (HobbitLong/CMC).

    moco-tf linear --encoder=runs/insdis_r50 --config=linear_insdis [--config.layer=4]
    moco-tf linear --encoder=runs/moco_v2_r50 --config=linear_insdis --layers=2,3,4,5,6

The classifier trains on views with jittered colours, as InsDis does. On ImageNet-100 the rate is 10 and crops are of
0.2 at least: --config.optimizer.lr_per_256=10 --config.views.crop_min=0.2. Published, ImageNet top-1: InsDis 56.5 % (NCE,
4096 negatives), 57.1 % (softmax, 4096), 58.5 % (softmax, 16384); MoCo 59.4 %. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_cmc_r50")
    config.views = dict(name="insdis", names=("image",), size=0, crop_min=0.08)
    return config
