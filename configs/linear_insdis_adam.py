"""linear_insdis by Adam, an option of CMC's code (HobbitLong/CMC), with its betas.

    moco-tf linear --encoder=runs/insdis_r50 --config=linear_insdis_adam

Its code names no rate for Adam; this one is Adam's usual. Not trained by us.
"""
from moco_tf.config import recipe


def get_config():
    config = recipe("linear_insdis")
    # Without decay AdamW is Adam.
    config.optimizer = dict(name="adamw", lr_per_256=0.001, weight_decay=0.0, beta_1=0.5, beta_2=0.999, epsilon=1e-8)
    return config
