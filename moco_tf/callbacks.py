"""What happens beside the training step: checkpoints, log lines, monitors, and stopping in order."""

import json
import logging
import math
import signal
import sys
import time

import tensorflow as tf

from moco_tf.distribute import Hosts
from moco_tf.errors import DataError, DivergedError, Preempted
from moco_tf.files import write_file

keras = tf.keras

COLLAPSED_STD = 0.1        # feature_std below this: embeddings are all but alike
INPUT_BOUND_SHARE = 0.25   # of the time spent waiting for data
FAR_PARTITION = 3.0        # partition_ratio above this, or below its inverse: Z of NCE is off


class Checkpoints:
    """The run's state in `folder`: the newest `keep` saves, of which the newest readable one is restored.

    Args:
        method: a compiled, built Method.
        folder: may be gs://; one that all hosts see.
        hosts: which train together; None: there is one.
    """

    def __init__(self, method, folder, keep=2, hosts=None):
        self.folder, self.hosts = folder, hosts or Hosts(tf.distribute.get_strategy())
        self.checkpoint = tf.train.Checkpoint(method=method, optimizer=method.optimizer)
        self.manager = tf.train.CheckpointManager(self.checkpoint, folder, max_to_keep=keep, checkpoint_name="step")
        self.good = None    # path of the newest one that this process has read or written

    def restore(self):
        """Returns the step restored, or None when there is nothing to restore.

        Raises:
            DataError: there are checkpoints, and none of them can be read.
        """
        # By what lies there, not by the manager's list, which a killed run may have left behind it.
        found = saved_checkpoints(self.folder)[::-1]
        for path in found:
            try:
                self.checkpoint.restore(path).assert_existing_objects_matched()
                self.good = path
                return step_of(path)
            except (tf.errors.OpError, ValueError, AssertionError, IndexError, RuntimeError) as error:
                tf.get_logger().setLevel("ERROR")    # else TensorFlow lists, after our own last word, what it did not restore
                logging.warning("checkpoint %s cannot be read, trying the one before: %s", path, _first_line(error))
        if found:
            raise DataError(f"At least one checkpoint must be readable to resume. Tried {', '.join(found)}. "
                            "Start again with another workdir.")
        return None

    def save(self, step):
        """All hosts call it together, at the same step, where their variables are equal: the chief writes them, and the
        others wait until it has.

        Raises:
            DataError: on all hosts, when it cannot be written; what was saved before is then still there.
        """
        failure = None
        self.checkpoint.save_counter    # all hosts make it together; of the rest each has its own copy
        if self.hosts.chief:
            try:
                self.manager.save(checkpoint_number=step)
            except (tf.errors.OpError, OSError) as error:
                self._remove_remains(f"step-{step}")
                failure = _first_line(error)
        if self.hosts.sum(failure is not None):
            raise DataError(f"A checkpoint must be written to {self.folder}. Received: "
                            f"{failure or 'an error of the chief, which says more'}. "
                            f"The last good one is {self.good or 'none'}; make room and start again, "
                            "the same command resumes.")
        self.good = f"{self.folder}/step-{step}"

    def _remove_remains(self, name):
        for remains in tf.io.gfile.listdir(self.folder):
            path = f"{self.folder}/{remains}"
            try:
                if remains.startswith(f"{name}_temp"):
                    tf.io.gfile.rmtree(path)
                elif remains.startswith(f"{name}."):
                    tf.io.gfile.remove(path)
            except tf.errors.OpError:
                pass    # what cannot be removed does no harm: no list of checkpoints names it


def saved_checkpoints(folder):
    """Paths of the checkpoints in a folder, oldest first."""
    if not tf.io.gfile.isdir(folder):
        return []
    names = [name[:-len(".index")] for name in tf.io.gfile.listdir(folder)
             if name.startswith("step-") and name.endswith(".index")]
    return sorted((f"{folder}/{name}" for name in names), key=step_of)


def step_of(path):
    """The step of a checkpoint's path; None of None."""
    return path and int(path.rsplit("-", 1)[1])


def _first_line(error):
    return str(getattr(error, "message", error)).strip().split("\n")[0].rstrip(".")


class StepCallback(keras.callbacks.Callback):
    """Calls `on_step(step, logs)` with the run's global step, counted from 1; `crossed` tells when n steps are over."""

    # Keras' own callbacks set this: logs stay tensors, and only a step that is looked at waits for its values.
    _supports_tf_logs = True

    def __init__(self, first_step):
        super().__init__()
        self.step = self.previous = first_step
        self._first_step = first_step

    def on_train_batch_end(self, batch, logs=None):
        self.previous, self.step = self.step, self._first_step + batch + 1
        self.on_step(self.step, logs)

    def crossed(self, every):
        return every > 0 and self.step // every > self.previous // every


class Log(StepCallback):
    """Every n steps one line of metrics.jsonl, one on the screen and TensorBoard's scalars; says what looks wrong.

    Args:
        first_step, total_steps, steps_per_epoch: where the run stands.
        batch_size: global.
        every: steps between the lines.
        path: of metrics.jsonl; lines of steps after `first_step`, of a run that was killed, are taken out. None: no file.
        writer: of tf.summary, or None.
        clock: the pipeline's BatchClock, or None.
        chance: the loss of guessing, in nats, as of `Method.chance_loss`; each line has it beside the loss.
    """

    def __init__(self, first_step, total_steps, steps_per_epoch, batch_size, every, path, writer, clock, chance,
                 schedule):
        super().__init__(first_step)
        self.total_steps, self.steps_per_epoch, self.batch_size = total_steps, steps_per_epoch, batch_size
        self.every, self.path, self.writer, self.clock = every, path, writer, clock
        self.chance, self.schedule = chance, schedule
        self.warned, self.busy_seconds, self.trained_steps = set(), 0.0, 0
        self.window_began, self.window_start, self.begins = None, first_step, []
        self.line = ProgressLine()
        if path:
            keep_lines(path, lambda line: line["step"] <= first_step)

    def on_train_batch_begin(self, batch, logs=None):
        now = time.time()
        if self.window_began is None:
            self.window_began, self.window_start = now, self._first_step + batch
        self.begins.append((self._first_step + batch, now))

    def on_step(self, step, logs):
        last = step == self.total_steps
        if not (self.crossed(self.every) or last):
            if self.previous == self._first_step:    # the first step is traced and compiled: not what the others cost
                self.window_began, self.begins = None, []
            return
        values = {name: float(value) for name, value in logs.items()}
        now = time.time()
        seconds = now - self.window_began
        rate = (step - self.window_start) * self.batch_size / seconds
        record = {"step": step, "epoch": (step - 1) // self.steps_per_epoch, **values, "chance_loss": self.chance,
                  "learning_rate": float(self.schedule(step - 1)),
                  "images_per_s": round(rate, 2), **self._data_wait(seconds)}
        if self.path:
            append_line(self.path, record)
        if self.writer:
            with self.writer.as_default(step=step):
                for name, value in record.items():
                    if name != "step":
                        tf.summary.scalar(name, value)
        self.busy_seconds += seconds
        self.trained_steps += step - self.window_start
        self._show(record, last)
        self._warn(record)
        self.window_began, self.begins = None, []

    def pause(self):
        """Time from now to the next step is not training's: a monitor or a save runs."""
        if self.window_began is not None:
            now = time.time()
            self.busy_seconds += now - self.window_began
            self.trained_steps += self.step - self.window_start
            self.window_began, self.begins = None, []

    def images_per_s(self):
        return self.trained_steps * self.batch_size / self.busy_seconds if self.busy_seconds else 0.0

    def _data_wait(self, seconds):
        """{"data_wait": the share of the window's seconds that its steps waited}, or {}."""
        if not self.clock:
            return {}
        ready = self.clock.times.numpy()
        waited = sum(max(0.0, ready[s % len(ready)] - began) for s, began in self.begins[-len(ready):])
        return {"data_wait": round(min(1.0, waited / seconds), 4)}

    def _show(self, record, last):
        rate = self.images_per_s()
        left = (self.total_steps - record["step"]) * self.batch_size / rate if rate else math.inf
        std = f"  std {record['feature_std']:.2f}" if "feature_std" in record else ""
        waiting = f"waiting for data {record['data_wait']:.0%}  " if "data_wait" in record else ""
        self.line.show(
            f"epoch {record['epoch'] + 1} step {record['step']}/{self.total_steps}  loss {record['loss']:.3f} "
            f"(chance {self.chance:.2f})  accuracy {record['accuracy']:.1%}{std}  lr {record['learning_rate']:.3g}  "
            f"{record['images_per_s']:.0f} images/s  {waiting}ETA {clock_time(left)}",
            force=last)

    def _warn(self, record):
        said = {
            "collapse": record.get("feature_std", 1.0) < COLLAPSED_STD and
            f"the embeddings are nearly alike (collapse): {self.model.against_collapse}.",
            "input": record["step"] > 2 * self.every and record.get("data_wait", 0) > INPUT_BOUND_SHARE and
            f"{record['data_wait']:.0%} of the time goes into waiting for data: the input pipeline is the limit "
            "(more cores, smaller images, or packed records: `moco-tf data pack`).",
            "partition": not 1 / FAR_PARTITION < record.get("partition_ratio", 1.0) < FAR_PARTITION and
            f"Z of NCE is {record.get('partition_ratio', 1.0):.3g} times that of random rows: probabilities are far from "
            "calibrated. method.partition_momentum=0.99 lets Z follow; the softmax needs none.",
            "bad": record["bad_steps"] > 0 and
            f"{record['bad_steps']:.0f} step(s) had a non-finite loss or gradient and were skipped.",
        }
        for name, sentence in said.items():
            if sentence and name not in self.warned:
                self.warned.add(name)
                self.line.above(f"note: {sentence}")


class ProgressLine:
    """One line that is written over on a terminal; elsewhere a line every ten seconds."""

    def __init__(self, seconds=10.0):
        self.terminal, self.seconds, self.shown_at = sys.stdout.isatty(), seconds, -math.inf
        self.width = 0

    def show(self, text, force=False):
        now = time.time()
        if self.terminal:
            print("\r" + text.ljust(self.width), end="\n" if force else "", flush=True)
            self.width = 0 if force else len(text)
        elif force or now - self.shown_at >= self.seconds:
            print(text, flush=True)
            self.shown_at = now

    def above(self, text):
        """A line of its own."""
        print(("\n" if self.terminal and self.width else "") + text, flush=True)
        self.width = 0


class Monitor:
    """Measures at a step, writes a line of monitor.jsonl and TensorBoard's scalars, and shows the values.

    Args:
        measure: () -> {name: value}.
        titles: {name: how it is shown}; other values are written only.
        path: of monitor.jsonl.
        writer: of tf.summary, or None.
        line: the `ProgressLine` to print above.
    """

    def __init__(self, measure, titles, path, writer, line):
        self.measure, self.titles, self.path, self.writer, self.line = measure, titles, path, writer, line

    def __call__(self, step):
        """A step that is written down already is not measured again."""
        if any(record["step"] == step for record in read_lines(self.path)):
            return
        values = self.measure()
        append_line(self.path, {"step": step, **values})
        if self.writer:
            with self.writer.as_default(step=step):
                for name, value in values.items():
                    tf.summary.scalar(f"monitor/{name}", value)
        shown = ", ".join(f"{title} {values[name]:.2%}" for name, title in self.titles.items() if name in values)
        self.line.above(f"step {step}: {shown} (held-out images)")


class StopWhenDiverged(StepCallback):
    """Ends the run after `limit` non-finite steps in a row. They were skipped, so that every checkpoint is good."""

    def __init__(self, first_step, limit, checkpoints):
        super().__init__(first_step)
        self.limit, self.checkpoints = limit, checkpoints

    def on_step(self, step, logs):
        if self.crossed(max(1, min(self.limit // 2, 10))) and (bad := int(logs["longest_bad_row"])) >= self.limit:
            raise DivergedError(
                f"Loss and gradients must be finite. Received: {bad} non-finite steps in a row by step {step} "
                f"(all skipped). The last good checkpoint is {self.checkpoints.good or 'none'}. "
                "Lower optimizer.lr_per_256, set optimizer.clip_norm, or use precision=bfloat16 or float32.")


class Every(StepCallback):
    """Calls `action(step)` every n steps, off the training clock."""

    def __init__(self, first_step, steps, action, log):
        super().__init__(first_step)
        self.steps, self.action, self.log = steps, action, log

    def on_step(self, step, logs):
        if self.crossed(self.steps):
            self.log.pause()
            self.action(step)


class StopOnSignal(StepCallback):
    """SIGTERM or Ctrl-C: the step in flight ends, the run is saved, and `Preempted` ends the command with code 75.

    Of several hosts any one may get the signal; they ask each other every few steps, and stop at the same one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    ASK_EVERY = 5    # steps; asking takes milliseconds, and until then the signal waits

    def __init__(self, first_step, checkpoints, hosts=None):
        super().__init__(first_step)
        self.checkpoints, self.received = checkpoints, None
        self.hosts = hosts or Hosts(tf.distribute.get_strategy())

    def __enter__(self):
        self.before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number, _):
        self.received = number

    def on_step(self, step, logs):
        if (self.hosts.count == 1 or self.crossed(self.ASK_EVERY)) and self.hosts.sum(self.received is not None):
            self.save_and_stop(step)

    def save_and_stop(self, step):
        self.checkpoints.save(step)
        sender = signal.Signals(self.received).name if self.received else "a signal to another host"
        raise Preempted(f"stopped by {sender} and saved at step {step}; the same command goes on from there.")


def append_line(path, record):
    with tf.io.gfile.GFile(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path):
    """The records of a .jsonl file; a last line that a kill cut off is left out."""
    if not tf.io.gfile.exists(path):
        return []
    records = []
    with tf.io.gfile.GFile(path) as file:
        for line in file.read().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                logging.warning("%s: a broken line was left out", path)
    return records


def keep_lines(path, keep):
    """Takes the records out for which `keep` is False."""
    if tf.io.gfile.exists(path):
        write_file(path, "".join(json.dumps(record) + "\n" for record in read_lines(path) if keep(record)))


def clock_time(seconds):
    """Seconds as h:mm:ss."""
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
