"""Which rows of a memory bank are negatives: drawn on the device, each draw a function of (seed, step) alone."""

import io

import numpy as np
import tensorflow as tf

from moco_tf.errors import DataError


def uniform(seed, step, shape, size):
    """Draws with replacement, each of 0 .. size - 1 equally likely (to size / 2^64).

    Args:
        seed, step: integers; `step` may be a tensor.
        shape: of the result.
        size: n.

    Returns:
        int64 of that shape; the same with and without XLA.
    """
    return _integers(_seeds(seed, step)[0], shape, size)


def alias_table(weights):
    """Walker's alias method as Vose builds it: a table from which a draw by any weights costs two uniform ones.

    A draw takes a row i uniformly, and stays with i if a number uniform on [0, 1) is below its acceptance, else goes to
    its alias. The table is built row by row in Python: a second or two for a million rows.

    Args:
        weights: (n,) >= 0, with a sum > 0.

    Returns:
        (acceptance (n,) float64 in [0, 1], alias (n,) int64).

    Raises:
        ValueError: weights that are negative or not finite, or all zero.
    """
    weights = np.asarray(weights, np.float64)
    if weights.ndim != 1 or not (np.isfinite(weights).all() and weights.min(initial=0.0) >= 0 and weights.sum() > 0):
        raise ValueError("Weights to draw by must be one row of finite numbers >= 0, and not all zero. "
                         f"Received: shape {weights.shape}, from {weights.min(initial=np.inf)} to "
                         f"{weights.max(initial=-np.inf)}.")
    acceptance = (weights * (len(weights) / weights.sum())).tolist()    # 1 is a row's fair share
    alias = list(range(len(weights)))
    small = [row for row, share in enumerate(acceptance) if share < 1.0]
    large = [row for row, share in enumerate(acceptance) if share >= 1.0]
    while small and large:
        under, over = small.pop(), large[-1]
        alias[under] = over
        acceptance[over] -= 1.0 - acceptance[under]
        if acceptance[over] < 1.0:
            small.append(large.pop())
    for row in (*small, *large):    # what is left differs from 1 by rounding only
        acceptance[row] = 1.0
    return np.array(acceptance), np.array(alias, np.int64)


def read_table(path, size):
    """The `alias_table` of the numbers in an .npy file, local or gs://.

    Raises:
        DataError: no such file; not `size` numbers in it, or such that `alias_table` does not take.
    """
    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            weights = np.lib.format.read_array(io.BytesIO(file.read()), allow_pickle=False)
        if weights.shape != (size,):
            raise DataError(f"method.weights must hold a number for each of the {size} training images, in the order of "
                            f"their index. Received: shape {weights.shape} in {path}. Images that are held out, or left "
                            "out by data.fraction, have none.")
        return alias_table(weights)
    except (OSError, tf.errors.OpError, ValueError) as error:
        raise DataError(f"method.weights must be an .npy file of one row of numbers. Received: {path}: "
                        f"{' '.join(str(getattr(error, 'message', error)).split()).rstrip('.')}.") from None


def weighted(seed, step, shape, table):
    """Draws with replacement by the weights of an `alias_table` (arrays or tensors); otherwise as `uniform`."""
    acceptance, alias = table
    seeds = _seeds(seed, step)
    rows = _integers(seeds[0], shape, alias.shape[0])
    toss = _integers(seeds[1], shape, 2 ** 32)    # integers, because XLA draws other floats than plain TensorFlow
    stay = toss < tf.cast(tf.round(tf.gather(acceptance, rows) * 2.0 ** 32), tf.int64)
    return tf.where(stay, rows, tf.gather(alias, rows))


def _seeds(seed, step):
    """Two seeds of (seed, step), (2, 2) int32; neither is that of another draw by (seed, step) itself."""
    return tf.random.split(tf.stack([tf.cast(seed, tf.int32), tf.cast(step, tf.int32)]), 2, alg="philox")


def _integers(seed, shape, size):
    """Uniform on 0 .. size - 1, int64."""
    return tf.random.stateless_uniform(shape, seed=seed, minval=0, maxval=size, dtype=tf.int64, alg="philox")
