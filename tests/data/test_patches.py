"""Photographs cut into patches: every pixel in its place, and what cannot be cut."""

import numpy as np
import pytest
from conftest import moco_tf
from PIL import Image

from moco_tf.data.patches import cut
from moco_tf.errors import DataError, UsageError


def photograph(path, height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def test_patches_are_the_photograph(tmp_path):
    pixels = photograph(tmp_path / "in/trips/one.png", 50, 70)
    assert cut(str(tmp_path / "in"), str(tmp_path / "out"), side=16) == (3 * 4, 1, [])
    for row in range(3):
        for column in range(4):
            patch = np.asarray(Image.open(tmp_path / f"out/trips-one/{row:03d}-{column:03d}.png"))
            np.testing.assert_array_equal(patch, pixels[16 * row:16 * row + 16, 16 * column:16 * column + 16])


def test_large_photographs_are_reduced_as_pillow_does(tmp_path):
    pixels = photograph(tmp_path / "in/one.png", 64, 96)
    assert cut(str(tmp_path / "in"), str(tmp_path / "out"), side=16, shorter_side=32)[0] == 2 * 3
    expected = np.asarray(Image.fromarray(pixels).resize((48, 32), Image.Resampling.BILINEAR), int)
    patch = np.asarray(Image.open(tmp_path / "out/one/001-002.png"), int)
    assert np.abs(patch - expected[16:32, 32:48]).max() <= 1


def test_what_cannot_be_cut_is_said(tmp_path):
    photograph(tmp_path / "in/good.png", 32, 32)
    photograph(tmp_path / "in/small.png", 8, 40)
    (tmp_path / "in/broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    patches, photographs, left_out = cut(str(tmp_path / "in"), str(tmp_path / "out"), side=16)
    assert (patches, photographs) == (4, 1) and {name for name, _ in left_out} == {"broken.jpg", "small.png"}
    with pytest.raises(UsageError, match="new or empty"):
        cut(str(tmp_path / "in"), str(tmp_path / "out"))
    with pytest.raises(UsageError, match="at least 8"):
        cut(str(tmp_path / "in"), str(tmp_path / "other"), side=4)
    with pytest.raises(DataError, match="existing folder"):
        cut(str(tmp_path / "nowhere"), str(tmp_path / "other"))
    with pytest.raises(DataError, match="give a patch of 64"):
        cut(str(tmp_path / "in"), str(tmp_path / "other"), side=64)


def test_the_command_says_what_it_did(tmp_path):
    photograph(tmp_path / "in/one.png", 40, 40)
    done = moco_tf("data", "cut", str(tmp_path / "in"), str(tmp_path / "out"), "--side=20")
    assert done.returncode == 0 and "4 patches of 1 photographs" in done.stdout
