"""Methods by name."""

from moco_tf.methods.insdis import InsDis
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3

METHODS = {"moco": MoCo, "moco_v3": MoCoV3, "insdis": InsDis}
