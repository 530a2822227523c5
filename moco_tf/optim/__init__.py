"""Optimizers by name."""

from moco_tf.optim.sgd import SGD

OPTIMIZERS = {"sgd": SGD}
