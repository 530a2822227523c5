"""Without files the other tests of this folder would have nothing to run on, and pass."""

import glob
import os

from .replay import FOLDER


def test_there_are_golden_files():
    assert glob.glob(os.path.join(FOLDER, "*.npz")), f"MOCO_TF_GOLDEN must name a folder of .npz files. Received: {FOLDER}."
