"""Methods by name."""

from moco_tf.methods.moco import MoCo

METHODS = {"moco": MoCo}
