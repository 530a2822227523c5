"""Linear classification on one layer of CMC's ResNets, as its code has it: layer 6, the pooled features, 60 epochs,
learning rate 30 (HobbitLong/CMC).

    moco-tf linear --encoder=runs/cmc_r50 --config=linear_cmc_r50 [--config.layer=4]

The rate is that of ResNet-50 of half and of one width; for two widths it is 50: --config.optimizer.lr_per_256=50. On
ImageNet-100 its crops are of 0.2 of the image at least: --config.views.crop_min=0.2. Published, ImageNet-100, half a
width, YCbCr: 75.8 %; ImageNet, the best ResNet: 68.4 %. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_cmc")
    config.update(dict(
        layer=6,                                     # 1 is the stem, 2 to 5 are the stages, 6 the pooled features
        pool=dict(reduce="avg", cells=(8, 6, 4, 3)),
        views=dict(crop_min=0.08), optimizer=dict(lr_per_256=30.0)))
    return config
