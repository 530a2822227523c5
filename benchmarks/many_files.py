"""A run's start on very many small files: time and memory until the first batch, part by part.

    python benchmarks/many_files.py make /tmp/many --files=1300000
    python benchmarks/many_files.py start /tmp/many --rounds=3 --json=start.json

`make` writes JPEG files in class folders of names as long as ImageNet's. Only a few hundred differ; the others are hard
links to them, which are made in a minute and take no space but that of their names.

`start` runs processes of their own, one after the other. Each opens the folder as `moco-tf pretrain` does and waits for
a first batch of MoCo v2's views. The time of a part is that from the end of the one before it, and memory is the most
that was resident until then. The first process may have to read the folders from the disk ("cold"); the rest are
medians of the others. CPU time, of all threads, is what other work on the machine leaves as it is.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

from tqdm import tqdm

LINKS = 50_000    # to a file; file systems allow 65,000 or more


def main():
    args = parse()
    if args.action == "make":
        make(args.path, args.files, args.classes)
    else:
        start(args)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["make", "start"])
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--files", type=int, default=1_300_000, help="make: how many")
    parser.add_argument("--classes", type=int, default=1000, help="make: folders")
    parser.add_argument("--size", type=int, default=64, help="start: of the views")
    parser.add_argument("--batch_size", type=int, default=256, help="start: images")
    parser.add_argument("--rounds", type=int, default=3, help="start: processes after the first")
    parser.add_argument("--json", help="start: file for the figures")
    return parser.parse_args()


def make(path, files, classes):
    import tensorflow as tf

    from moco_tf.data.sources import Embedded

    photos, each = Embedded(), -(-files // classes)
    path.mkdir(parents=True)
    originals = max(200, -(-files // LINKS))
    first = []
    for number in range(originals):
        image = tf.image.resize(photos.image({"index": number}), [64, 64])
        first.append(path / f".{number}.jpg")
        tf.io.write_file(os.fspath(first[-1]), tf.io.encode_jpeg(tf.cast(image, tf.uint8)))
    for number in tqdm(range(files), desc="files", unit="file"):
        rank, place = divmod(number, each)
        folder = path / f"n{10_000_000 + rank}"
        if place == 0:
            folder.mkdir()
        os.link(first[number % originals], f"{folder}/{folder.name}_{place}.JPEG")
    for file in first:
        file.unlink()


def start(args):
    spawn, rows = multiprocessing.get_context("spawn"), []
    for _ in tqdm(range(1 + args.rounds), desc="starts", unit="start"):
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=first_batch, args=(theirs, args.path, args.size, args.batch_size, time.time()))
        process.start()
        theirs.close()
        rows.append(ours.recv())
        process.join()
    cold, *warm = rows
    print(f"{'part':34} {'cold s':>7} {'warm s':>7} {'CPU s':>7} {'peak MiB':>9}")
    for part in cold:
        seconds, cpu, peak = (statistics.median(w[part][name] for w in warm or rows)
                              for name in ("seconds", "cpu_s", "peak_mib"))
        print(f"{part:34} {cold[part]['seconds']:7.2f} {seconds:7.2f} {cpu:7.2f} {peak:9.0f}")
    if args.json:
        report = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "starts": rows}
        pathlib.Path(args.json).write_text(json.dumps(report, indent=2))


def first_batch(pipe, path, size, batch_size, began):
    """Sends {part: {seconds, cpu_s, peak_mib}}."""
    from moco_tf.bench.timing import peak_mib

    parts, before = {}, (began, 0.0)

    def done(part):
        nonlocal before
        now = time.time(), time.process_time()
        seconds, cpu_s = (after - since for after, since in zip(now, before))
        parts[part], before = {"seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak_mib()}, now

    import tensorflow as tf

    from moco_tf import train
    from moco_tf.config import load, override
    from moco_tf.data.pipeline import training_batches
    done("Python, TensorFlow and the package")
    config = override(load("moco_v2_r50"), **{"data.name": "folder", "data.path": os.fspath(path), "views.size": size})
    source, _ = train.open_data(config)
    done("listing the files")
    batches = iter(training_batches(source, train.view_recipe(config), batch_size, source.size // batch_size, seed=0))
    done("building the pipeline")
    next(batches)
    done("the first batch")
    parts["all"] = {"seconds": before[0] - began, "cpu_s": before[1], "peak_mib": peak_mib()}
    pipe.send(parts)


if __name__ == "__main__":
    main()
