"""Linear classification on one layer of CMC's AlexNets, as its code has it: layer 5, 60 epochs, learning rate 0.1
(HobbitLong/CMC; arXiv:1906.05849).

    moco-tf linear --encoder=runs/cmc_alexnet --config=linear_cmc [--config.layer=3]
    moco-tf linear --encoder=runs/cmc_alexnet --config=linear_cmc --layers=1,2,3,4,5

Both branches' maps, side by side along the channels, are pooled to a grid and flattened. The encoder's normalisation
makes the colour space. The rate does not scale with the batch there. Published: 42.6 % ImageNet top-1. Not trained by
us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_v1v2")
    config.update(dict(
        layer=5,                                     # 1 to 5 are convolutions, 6 and 7 fully connected
        pool=dict(reduce="max", cells=(10, 6, 5, 5)),    # a side, of layers 1 to 4; later ones are not pooled
        epochs=60, views=dict(crop_min=0.2), optimizer=dict(lr_per_256=0.1)))
    config.schedule = dict(name="steps", milestones=(30, 40, 50), gamma=0.2)
    return config
