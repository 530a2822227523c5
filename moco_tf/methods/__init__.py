"""Methods by name."""

from moco_tf.methods.end_to_end import EndToEnd
from moco_tf.methods.insdis import CMC, InsDis
from moco_tf.methods.moco import MoCo
from moco_tf.methods.moco_v3 import MoCoV3

METHODS = {"moco": MoCo, "moco_v3": MoCoV3, "insdis": InsDis, "cmc": CMC, "end_to_end": EndToEnd}
