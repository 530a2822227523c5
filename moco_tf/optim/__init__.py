"""Optimizers by name."""

from moco_tf.optim.adamw import AdamW
from moco_tf.optim.lamb import LAMB
from moco_tf.optim.lars import LARS
from moco_tf.optim.sgd import SGD

OPTIMIZERS = {"sgd": SGD, "lars": LARS, "adamw": AdamW, "lamb": LAMB}
