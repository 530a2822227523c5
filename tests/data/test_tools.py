"""check and pack: every image is accounted for, and a pack is whole or does not count."""

import io
import os

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from moco_tf.data import tools
from moco_tf.data.sources import Folder, open_source
from moco_tf.errors import DataError, UsageError

CUT_OFF = (("ape", 3), ("bee", 0), ("cat", 19))


def encoded(seed, height=24, width=30, file_format="JPEG"):
    content = io.BytesIO()
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.BICUBIC).save(content, file_format)
    return content.getvalue()


@pytest.fixture
def photos(tmp_path):
    """Three classes of 20 JPEGs, of which three are cut off."""
    root = tmp_path / "photos"
    for name in ("ape", "bee", "cat"):
        (root / name).mkdir(parents=True)
        for i in range(20):
            content = encoded(seed=i)
            (root / name / f"{i:02d}.jpg").write_bytes(content[:len(content) // 2] if (name, i) in CUT_OFF else content)
    return str(root)


class Failing(Folder):
    """A folder whose reader breaks down at the thirtieth image it is asked for, as a killed process would."""

    asked = 0

    def encoded(self, example):
        self.asked += 1
        if self.asked == 30:
            raise KeyboardInterrupt
        return super().encoded(example)


def packed_indices(out):
    return sorted(int(example["index"]) for example in open_source("records", out).examples())


def test_check_names_the_cut_off_files_among_others(photos):
    report = tools.check(photos, workers=3)
    assert [name for name, _ in report.unreadable] == ["ape/03.jpg", "bee/00.jpg", "cat/19.jpg"]
    assert all("Invalid JPEG data" in why and "\n" not in why and "{{" not in why for _, why in report.unreadable)
    assert (report.images, report.types) == (57, {"JPEG": 57})
    assert report.groups == {"ape": 19, "bee": 19, "cat": 19}


def test_check_measures_sides_and_counts_types_by_content(tmp_path):
    sizes = ((10, 20, "PNG"), (40, 12, "BMP"), (16, 16, "GIF"), (30, 18, "JPEG"))
    for i, (height, width, file_format) in enumerate(sizes):
        (tmp_path / f"{i}.png").write_bytes(encoded(i, height, width, file_format))
    report = tools.check(str(tmp_path))
    assert report.types == {"PNG": 1, "BMP": 1, "GIF": 1, "JPEG": 1}
    assert (report.shorter, report.longer) == ((10, 14.0, 18), (16, 25.0, 40))
    assert (report.groups, report.unreadable) == ({}, [])


def test_check_looks_at_one_split_or_at_all(tmp_path):
    for name in ("train/a/0.png", "train/b/1.png", "test/a/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(0, file_format="PNG"))
    assert tools.check(str(tmp_path)).images == 3
    assert tools.check(str(tmp_path), "train").groups == {"a": 1, "b": 1}
    assert tools.check(str(tmp_path), "val").images == 1
    tools.pack(str(tmp_path), str(tmp_path / "packed"), "train")
    tools.pack(str(tmp_path), str(tmp_path / "packed"), "test")
    assert tools.check(str(tmp_path / "packed")).images == 3
    assert tools.check(str(tmp_path / "packed"), "val").images == 1


def test_check_refuses_what_holds_no_images(tmp_path):
    for path in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(DataError, match=path):
            tools.check(path)


def test_report_as_text(photos):
    text = tools.format_report(tools.check(photos))
    assert "57 readable images, 3 unreadable" in text
    assert "JPEG 57" in text and "ape 19, bee 19, cat 19" in text
    assert "shorter 24 / 24 / 24, longer 30 / 30 / 30" in text
    assert text.splitlines()[-4] == "unreadable: 3" and text.splitlines()[-1].startswith("  cat/19.jpg: ")


def test_pack_leaves_out_and_lists_what_is_unreadable(photos, tmp_path):
    out = str(tmp_path / "packed")
    packed = tools.pack(photos, out, shards=4)
    assert (packed.images, packed.shards) == (57, 4)
    assert sorted(name for name, _ in packed.unreadable) == [f"{photos}/{name}/{i:02d}.jpg" for name, i in CUT_OFF]
    assert packed_indices(out) == list(range(57))    # without gaps
    with open(f"{photos}/ape/04.jpg", "rb") as file:    # the one after the first that was left out
        wanted = file.read()
    (found,) = [e for e in open_source("records", out).examples() if int(e["index"]) == 3]
    assert found["encoded"].numpy() == wanted
    assert tools.format_packed(packed).count("\n") == 4 and "57 images" in tools.format_packed(packed)
    assert tools.check(out).groups == {"ape": 19, "bee": 19, "cat": 19}


def test_pack_of_arrays_is_lossless(tmp_path):
    source = open_source("embedded", split="test")
    part = type("Part", (), {})    # a source need not be one of ours
    part.random_access, part.size, part.class_names = True, 20, source.class_names
    part.examples = staticmethod(lambda seed, epoch: source.examples().take(20))
    part.encoded, part.label, part.describe = source.encoded, source.label, source.describe
    assert tools.pack(part, str(tmp_path), "test").shards == 1
    records = open_source("records", str(tmp_path), "test")
    assert records.image_shape == (28, 28, 3)
    for example in records.examples().map(records.decode):
        expected = source.decode({"index": example["index"]})
        np.testing.assert_array_equal(example["image"], expected["image"])
        assert example["label"] == expected["label"]


def test_a_killed_pack_never_looks_complete_and_a_rerun_clears_it_away(photos, tmp_path):
    out = str(tmp_path / "packed")
    with pytest.raises(KeyboardInterrupt):
        tools.pack(Failing(photos), out, shards=12, workers=1)
    left = os.listdir(out)
    assert any(name.endswith(".tfrecord") for name in left) and "train.json" not in left
    for reader in (lambda: open_source("records", out), lambda: tools.check(out)):
        with pytest.raises(DataError, match="no finished pack of split 'train'"):
            reader()
    tools.pack(photos, out, shards=2)
    assert sorted(os.listdir(out)) == ["train-00000.tfrecord", "train-00001.tfrecord", "train.json"]
    assert packed_indices(out) == list(range(57))


def test_a_finished_pack_is_replaced_only_if_asked(photos, tmp_path):
    out = str(tmp_path / "packed")
    tools.pack(photos, out, shards=3)
    with pytest.raises(UsageError, match="overwrite"):
        tools.pack(photos, out, shards=1)
    assert len(os.listdir(out)) == 4
    tools.pack(photos, out, shards=1, overwrite=True)
    assert sorted(os.listdir(out)) == ["train-00000.tfrecord", "train.json"]


def test_shards_are_closed_by_size(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "SHARD_BYTES", 10_000)
    packed = tools.pack(photos, str(tmp_path / "packed"))
    assert packed.shards > 2
    sizes = [os.path.getsize(path) for path in (tmp_path / "packed").glob("*.tfrecord")]
    assert sum(sizes) == packed.bytes and max(sizes) < 12_000


def test_pack_of_nothing_readable_or_to_nowhere_fails(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(DataError, match="all 1"):
        tools.pack(str(tmp_path / "bad"), str(tmp_path / "packed"))
    assert not os.path.exists(tmp_path / "packed" / "train.json")
    (tmp_path / "bad" / "a.jpg").write_bytes(encoded(0))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="write .*file/packed"):
        tools.pack(str(tmp_path / "bad"), str(tmp_path / "file" / "packed"))


def test_check_goes_on_past_a_damaged_shard(photos, tmp_path):
    out = tmp_path / "packed"
    tools.pack(photos, str(out), shards=3)
    shards = [len(list(tf.data.TFRecordDataset(str(path)))) for path in sorted(out.glob("*.tfrecord"))]
    content = (out / "train-00001.tfrecord").read_bytes()
    (out / "train-00001.tfrecord").write_bytes(content[:len(content) // 2])
    (out / "train-00002.tfrecord").unlink()
    report = tools.check(str(out))
    assert [name for name, _ in report.unreadable] == ["train-00001.tfrecord", "train-00002.tfrecord"]
    assert f"of {shards[1]} images" in report.unreadable[0][1] and f"after 0 of {shards[2]}" in report.unreadable[1][1]
    assert shards[0] < report.images < shards[0] + shards[1]


def test_in_parallel_keeps_the_order_and_does_not_run_ahead():
    started = []
    results = tools.in_parallel((lambda i=i: started.append(i) or i for i in range(500)), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    assert len(started) <= 2 * 8 + 4
    assert list(results) == list(range(3, 500))
