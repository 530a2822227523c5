"""Negatives of each query's own against negatives shared by all queries: time of a step, and memory.

    python benchmarks/negatives.py --num_negatives=16384 --json=negatives.json

Measured is InsDis' own training step, on given vectors with a linear layer in the place of a network: drawing
negatives, reading them from the bank, the loss, its gradients to the queries, and the update of the bank. The two kinds
run in a process of their own each, in turns, so that what else the machine does meets both alike.

The shared draw reads K rows a step and scores them by one matrix product; draws of each query's own read B K rows, 1.07
GB at B = 128, K = 16384, C = 128, for a batched product that touches each of them once. What the shared draw changes:
each query's loss has the same expectation, but all queries of a step meet the same K rows in place of B K different
ones. The gradient of a step is noisier by the queries' common draw, and a row that is drawn pushes all queries at once,
as the keys of MoCo's queue do.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from tqdm import tqdm

KINDS = {"own": False, "shared": True}    # whether negatives are shared


def main():
    args = parse()
    spawn, cases = multiprocessing.get_context("spawn"), {}
    for kind, shared in KINDS.items():
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=measured, args=(theirs, args, shared), daemon=True)
        process.start()
        theirs.close()
        cases[kind] = dict(process=process, pipe=ours, seconds=[])
        ours.recv()    # ready
    load = os.getloadavg()[0]
    for _ in tqdm(range(args.rounds), desc="rounds", unit="round"):
        for case in cases.values():
            case["pipe"].send(args.steps)
            case["seconds"] += case["pipe"].recv()
    report = {**vars(args), "cpus": os.cpu_count(), "load_before": load, "load_after": os.getloadavg()[0]}
    for kind, case in cases.items():
        case["pipe"].send(0)
        report[kind] = {**quartiles(case["seconds"]), **case["pipe"].recv()}
        case["process"].join()
    print(f"n = {args.bank_size}, K = {args.num_negatives}, B = {args.batch_size}, C = {args.dim}, {args.loss}; "
          f"{args.rounds} x {args.steps} steps of each in turns, {os.cpu_count()} CPUs, load {load:.1f} before")
    print(f"{'negatives':10} {'median ms':>10} {'quartiles':>17} {'step MiB':>9} {'bank MiB':>9}")
    for kind in KINDS:
        row = report[kind]
        print(f"{kind:10} {row['median_ms']:10.1f} {row['low_ms']:8.1f} {row['high_ms']:8.1f} "
              f"{row['step_mib']:9.0f} {row['bank_mib']:9.0f}")
    print(f"own / shared: time {report['own']['median_ms'] / report['shared']['median_ms']:.1f}, "
          f"memory of a step {report['own']['step_mib'] / report['shared']['step_mib']:.1f}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank_size", type=int, default=1_281_167, help="n (default: ImageNet's %(default)s)")
    parser.add_argument("--num_negatives", type=int, default=16384, help="K (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="B (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=128, help="C (default: %(default)s)")
    parser.add_argument("--loss", choices=("nce", "softmax"), default="softmax")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each kind (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn (default: %(default)s)")
    parser.add_argument("--json", help="file to write the figures to")
    return parser.parse_args()


def quartiles(seconds):
    low, median, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
    return {"median_ms": median, "low_ms": low, "high_ms": high}


def measured(pipe, args, shared):
    """In a process of its own: times as many steps as asked for, each by itself; asked for none, tells the memory."""
    import tensorflow as tf

    from moco_tf.methods.insdis import InsDis
    from moco_tf.optim.sgd import SGD

    keras = tf.keras
    for gpu in tf.config.list_physical_devices("GPU"):    # or one process would take all of it from the other
        tf.config.experimental.set_memory_growth(gpu, True)
    memory = Memory(tf)
    vectors = keras.Input((args.dim,))
    method = InsDis(keras.Model(vectors, keras.layers.Dense(args.dim, use_bias=False)(vectors)), dim=args.dim,
                    bank_size=args.bank_size, temperature=0.07, num_negatives=args.num_negatives, loss=args.loss,
                    shared_negatives=shared)
    method.compile(optimizer=SGD(0.0))
    method.optimizer.build(method.trainable_weights)
    step = tf.function(method.train_step)
    views = [{"query": tf.random.stateless_normal((args.batch_size, args.dim), seed=(0, i)),
              "index": tf.random.stateless_uniform((args.batch_size,), (1, i), 0, args.bank_size, tf.int64)}
             for i in range(4)]
    step.get_concrete_function(views[0])    # tracing is not the step's
    bank_mib = args.bank_size * args.dim * 4 / 2 ** 20
    memory.begin()
    step(views[0])["loss"].numpy()    # the first step also builds kernels
    pipe.send("ready")
    while steps := pipe.recv():
        seconds = []
        for i in range(steps):
            began = time.perf_counter()
            step(views[i % len(views)])["loss"].numpy()
            seconds.append(time.perf_counter() - began)
        pipe.send(seconds)
    pipe.send({"step_mib": memory.peak_mib(), "bank_mib": bank_mib})


class Memory:
    """The most that is held above what is held at `begin`: of the GPU, or else of this process (Linux)."""

    def __init__(self, tf):
        self.gpu = tf.config.experimental if tf.config.list_physical_devices("GPU") else None
        self.held = 0

    def begin(self):
        if self.gpu:
            self.gpu.reset_memory_stats("GPU:0")
            self.held = self.gpu.get_memory_info("GPU:0")["current"] / 2 ** 20
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")    # the peak becomes what is held now
            self.held = self._status("VmHWM")

    def peak_mib(self):
        peak = self.gpu.get_memory_info("GPU:0")["peak"] / 2 ** 20 if self.gpu else self._status("VmHWM")
        return peak - self.held

    @staticmethod
    def _status(name):
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024


if __name__ == "__main__":
    main()
