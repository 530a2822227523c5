"""Weights and inputs of the golden files: nothing random is stored, both sides draw it again from a name and a shape.

One generator for each array, seeded with crc32(name) + seed; one float64 standard normal draw in PyTorch's layout,
scaled, then rounded once to float32. Names are those of PyTorch's state dicts, without the wrapper's prefix.
"""

import zlib

import numpy as np


def normal(name, shape, seed=0):
    """N(0, 1) of the shape in float64."""
    generator = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2 ** 32)
    return generator.standard_normal(tuple(shape))


def param(name, shape, seed=0):
    """The parameter or buffer `name` of a PyTorch model, float32; counters are int64 zeros."""
    leaf = name.split(".")[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    draw = normal(name, shape, seed)
    if leaf in ("bias", "running_mean"):
        value = 0.1 * draw
    elif leaf == "running_var":
        value = 1.0 + 0.1 * np.abs(draw)
    elif leaf in ("cls_token", "pos_embed"):
        value = 0.02 * draw
    elif len(shape) == 1:                     # the scale of a normalisation
        value = 1.0 + 0.1 * draw
    else:                                     # a convolution or linear layer: variance 1 / fan_in
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def images(name, n, size, channels=3, seed=0):
    """(n, size, size, channels) float32: blocks of an 8x8 grid and half as much noise, as if normalised."""
    blocks = normal(f"{name}/low", (n, 8, 8, channels), seed)
    blocks = np.kron(blocks, np.ones((1, size // 8, size // 8, 1)))
    return (blocks + 0.5 * normal(f"{name}/px", blocks.shape, seed)).astype(np.float32)


def views(name, n, size, seed=0):
    """Two noisy versions, query and key, of the same images."""
    base = images(name, n, size, 3, seed).astype(np.float64)
    return [(base + 0.5 * normal(f"{name}/{view}", base.shape, seed)).astype(np.float32) for view in "qk"]


def unit_rows(name, shape, seed=0):
    """Rows of norm 1, normalised in float64, float32."""
    rows = normal(name, shape, seed)
    return (rows / np.sqrt(np.sum(rows ** 2, axis=1, keepdims=True))).astype(np.float32)


FUNCTIONS = {function.__name__: function for function in (normal, param, images, views, unit_rows)}


def draw(rule, **fields):
    """A rule of a golden file, {"function": ..., its arguments}; `fields` fill the {step} and the like in its name."""
    arguments = {key: value for key, value in rule.items() if key != "function"}
    arguments["name"] = arguments["name"].format(**fields)
    return FUNCTIONS[rule["function"]](**arguments)
