"""Makes the embedded sample, fashion_mnist.npz, from the four original files of Fashion-MNIST (arXiv:1708.07747).

    python make_fashion_mnist.py [FOLDER_OF_ORIGINALS [RESULT]]

The originals are Debian's package dataset-fashion-mnist. The same originals give the same bytes.
"""

import gzip
import io
import os
import sys
import zipfile

import numpy as np

ORIGINALS = "/usr/share/datasets/fashion-mnist"     # where the Debian package puts them
SPLITS = {"train": ("train", 10_000), "test": ("t10k", 2_000)}    # our name: theirs, images taken from the start


def read_idx(path):
    """The uint8 array of a gzipped IDX file: 0, 0, 8, rank; `rank` big-endian int32 sizes; then the pixels."""
    with gzip.open(path) as file:
        content = file.read()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"An IDX file of unsigned bytes must start with 0, 0, 8. Received: {content[:3]!r} in {path}.")
    sizes = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(sizes)


def sample(folder):
    """{"train_images": (10000, 28, 28) uint8, "train_labels": (10000,) uint8, "test_images": ..., ...}."""
    arrays = {}
    for split, (prefix, count) in SPLITS.items():
        arrays[f"{split}_images"] = read_idx(os.path.join(folder, f"{prefix}-images-idx3-ubyte.gz"))[:count]
        arrays[f"{split}_labels"] = read_idx(os.path.join(folder, f"{prefix}-labels-idx1-ubyte.gz"))[:count]
    return arrays


def write_npz(path, arrays):
    """What numpy.savez writes, but LZMA-compressed (a seventh smaller than deflate) and with a fixed date."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_LZMA
            entry.create_system = 3    # the same byte on every platform
            archive.writestr(entry, content.getvalue())


def main(folder=ORIGINALS, result=os.path.join(os.path.dirname(os.path.abspath(__file__)), "fashion_mnist.npz")):
    write_npz(result, sample(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
