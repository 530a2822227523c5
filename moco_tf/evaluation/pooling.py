"""Pooling of feature maps to a grid of any size, as the probes of convolutional layers use it (CMC's code)."""

import tensorflow as tf

from moco_tf.errors import UsageError

REDUCTIONS = {"max": tf.reduce_max, "avg": tf.reduce_mean}


def adaptive_pool(features, cells, reduce):
    """PyTorch's adaptive pooling: cell i of a side of s pixels covers floor(i s / cells) to ceil((i + 1) s / cells).

    Cells are of uneven sizes and share pixels where `cells` does not divide the side.

    Args:
        features: (B, H, W, C), H and W static.
        cells: side of the grid.
        reduce: "max" or "avg", within each cell.

    Returns:
        (B, cells, cells, C) of the dtype of `features`.

    Raises:
        UsageError: another `reduce`; no cell.
    """
    if reduce not in REDUCTIONS:
        raise UsageError(f"Adaptive pooling must be one of {', '.join(REDUCTIONS)}. Received: {reduce!r}.")
    if cells < 1:
        raise UsageError(f"Adaptive pooling needs at least 1 cell a side. Received: {cells}.")
    _, height, width, _ = features.shape
    # One side after the other: all rows of a cell have the same number of columns, so a mean of means is the mean.
    rows = [REDUCTIONS[reduce](features[:, start:end], axis=1) for start, end in _bounds(height, cells)]
    rows = tf.stack(rows, axis=1)
    return tf.stack(
        [REDUCTIONS[reduce](rows[:, :, start:end], axis=2) for start, end in _bounds(width, cells)], axis=2)


def _bounds(side, cells):
    return [(cell * side // cells, -(-(cell + 1) * side // cells)) for cell in range(cells)]
