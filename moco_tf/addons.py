"""The only importer of tensorflow_addons, and what is used of it: the one file to change the day that package goes."""

import warnings

with warnings.catch_warnings():    # it says on import that it is past its end of life, which the design knows
    warnings.simplefilter("ignore")
    from tensorflow_addons.optimizers import LAMB

__all__ = ["LAMB"]
