"""What several replicas and hosts change: the strategy, and the few collectives. Everything else is written for one."""

import json
import os

import numpy as np
import tensorflow as tf

from moco_tf.errors import UsageError

STRATEGIES = ("auto", "default", "mirrored", "multi_worker", "tpu")
LOST = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError,
        tf.errors.DeadlineExceededError)    # how TensorFlow says that another process is gone


def set_intra_op_threads(count):
    """CPU threads within one operation; to be called before TensorFlow starts its devices. 0 leaves it to TensorFlow.

    With 1, small operations do not wait for each other's threads, and independent ones (the two encoders) still run
    side by side.
    """
    if count:
        tf.config.threading.set_intra_op_parallelism_threads(count)


def make_strategy(name="auto", cpu_replicas=0, tpu=""):
    """The `tf.distribute` strategy of a name, and a sentence that says why it is this one.

    Args:
        name: "default" (one device); "mirrored" (every local GPU, or `cpu_replicas` logical CPU devices);
            "multi_worker" (every GPU, or the CPU, of each host that the environment's TF_CONFIG names; one process on
            each); "tpu"; "auto": the first that applies of multi_worker, tpu, mirrored and default.
        cpu_replicas: > 0 splits the CPU into so many logical devices, one replica each: the same mathematics as so
            many GPUs. It must be asked for before TensorFlow has started its devices.
        tpu: "local": the chips of this machine; else the name of a slice; "": the environment's TPU_NAME, or local.

    Returns:
        (strategy, reason).

    Raises:
        UsageError: unknown name; what it needs is not here; more CPU replicas asked for than the started runtime has.
    """
    if name not in STRATEGIES:
        raise UsageError(f"The strategy must be one of {', '.join(STRATEGIES)}. Received: {name!r}.")
    if cpu_replicas > 1 and name not in ("auto", "mirrored"):
        raise UsageError(f"Only the strategy mirrored splits the CPU. Received: strategy {name!r} with "
                         f"cpu_replicas={cpu_replicas}. Use --strategy=mirrored.")
    if tpu and name not in ("auto", "tpu"):
        raise UsageError(f"Only the strategy tpu takes the name of a TPU. Received: strategy {name!r}, TPU {tpu!r}.")
    if cpu_replicas > 1:
        _split_cpu(cpu_replicas)
        devices = [f"/cpu:{i}" for i in range(cpu_replicas)]
        return tf.distribute.MirroredStrategy(devices), f"mirrored over {cpu_replicas} logical CPU devices, as asked"
    asked = ", as asked" if name != "auto" else ""
    if name == "multi_worker" or name == "auto" and len(_addresses()) > 1:
        return _multi_worker(), f"multi_worker{asked}: TF_CONFIG names {len(_addresses())} host(s)"
    tpu = tpu or os.environ.get("TPU_NAME", "")
    if name == "tpu" or name == "auto" and (tpu or tf.config.list_physical_devices("TPU")):
        return _tpu(tpu or "local"), f"tpu{asked}: {tpu or 'local'}"
    gpus = tf.config.list_physical_devices("GPU")
    if name == "mirrored" or name == "auto" and len(gpus) > 1:
        strategy = tf.distribute.MirroredStrategy()
        return strategy, f"mirrored{asked}: {strategy.num_replicas_in_sync} device(s) here"
    return tf.distribute.get_strategy(), f"default{asked}: {'one GPU' if gpus else 'no GPU here, the CPU'}"


def _addresses():
    """Of the hosts that TF_CONFIG names, the chief first; [] without."""
    return [address for _, addresses in sorted(_tf_config().get("cluster", {}).items()) for address in addresses]


def _tf_config():
    """What the environment's TF_CONFIG holds, {} without one.

    Raises:
        UsageError: it is not of the form that TensorFlow documents, or names other jobs than chief and worker.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        read = json.loads(text or "{}")
        if read.get("cluster"):
            read["cluster"][read["task"]["type"]][read["task"]["index"]]
        if set(read.get("cluster", {})) <= {"chief", "worker"}:
            return read
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        pass
    raise UsageError('TF_CONFIG must be like {"cluster": {"worker": ["HOST0:PORT", "HOST1:PORT"]}, "task": {"type": '
                     f'"worker", "index": 0}}, the index another on each host. Received: {text}.')


def _multi_worker():
    addresses = _addresses()
    if not addresses:
        raise UsageError("The strategy multi_worker needs TF_CONFIG in the environment, which names all hosts. "
                         "Received: none.")
    task = _tf_config()["task"]
    print(f"{task['type']} {task['index']}, waiting for all {len(addresses)} hosts: {', '.join(addresses)}", flush=True)
    communication = tf.distribute.experimental.CommunicationImplementation
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=communication.NCCL if tf.config.list_physical_devices("GPU") else communication.RING)
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    except (tf.errors.OpError, RuntimeError) as error:
        raise UsageError(f"The hosts of TF_CONFIG must find each other. Received: {_first_line(error)}. The ports must "
                         "be free, and open between the hosts; TensorFlow must not have computed before.") from None


def _tpu(name):
    print(f"connecting to the TPU {name}", flush=True)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=name)
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (tf.errors.OpError, RuntimeError, ValueError, OSError) as error:
        raise UsageError(f"A TPU must answer as {name!r}. Received: {_first_line(error)}. TensorFlow must be one made "
                         "for TPUs; --tpu=local is this machine's, which another process may hold, --tpu=NAME a "
                         "slice.") from None


def _first_line(error):
    return str(getattr(error, "message", error)).strip().split("\n")[0].rstrip(".")


class Hosts:
    """The processes that train together, each on a host of its own. The first one, the chief, writes what a run leaves.
    A TPU slice has one process, whatever its number of hosts.

    Attributes:
        count: how many there are.
        index: which one this is, 0 for the chief.
        remote_input: whether the input pipelines run in other processes, those of a TPU slice.
    """

    def __init__(self, strategy):
        self._strategy, self.count, self.index = strategy, 1, 0
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            task, addresses = _tf_config()["task"], _addresses()
            self.count = len(addresses)
            self.index = addresses.index(_tf_config()["cluster"][task["type"]][task["index"]])
        self.remote_input = (isinstance(strategy, tf.distribute.TPUStrategy)
                             and strategy.cluster_resolver.master() not in ("", "local"))

    @property
    def chief(self):
        return self.index == 0

    @property
    def others(self):
        """Whether the run needs other processes than this one, which may be gone while it goes on."""
        return self.count > 1 or self.remote_input

    def sum(self, number):
        """The sum of all hosts' integers. All call it together, outside of a step; it waits for the last."""
        return int(self.gather([number]).sum())

    def gather(self, numbers):
        """All hosts' lists of integers, (hosts, n) int64; called as `sum` is."""
        rows = np.zeros([self.count, len(numbers)], np.int64)
        rows[self.index] = numbers
        if self.count > 1:
            rows = self._strategy.reduce(tf.distribute.ReduceOp.SUM, tf.constant(rows), axis=None).numpy()
        return rows


def _split_cpu(count):
    cpu = tf.config.list_physical_devices("CPU")[0]
    try:
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    except RuntimeError:
        if len(tf.config.list_logical_devices("CPU")) < count:
            raise UsageError("Logical CPU devices must be set up before TensorFlow starts its devices. Received: "
                             f"{count} replicas after the start. Ask for them in a fresh process.") from None


def gather_rows(rows):
    """(N, ...) on every replica -> (R * N, ...): the rows of all replicas in rank order, the same everywhere."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return rows
    gathered = context.all_gather(tf.identity(rows), axis=0)    # on this device: an input of the step is on none yet
    gathered.set_shape([context.num_replicas_in_sync * rows.shape[0], *rows.shape[1:]])
    return _with_dense_gradient(gathered)


@tf.custom_gradient
def _with_dense_gradient(rows):
    """The rows as they are; the sparse gradient that `tf.gather` makes becomes one that replicas can add up."""
    return tf.identity(rows), tf.convert_to_tensor


def first_row(rows_per_replica):
    """Where the rows of this replica begin among the gathered ones."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group * rows_per_replica


def own_rows(rows, count):
    """Of (R * count, ...) gathered rows the (count, ...) of this replica."""
    if tf.distribute.get_replica_context().num_replicas_in_sync == 1:
        return rows
    begin = tf.stack([first_row(count), *[0] * (len(rows.shape) - 1)])
    return tf.slice(rows, begin, [count, *rows.shape[1:]])    # of a static shape, which XLA needs


def sum_over_replicas(value):
    """A tensor -> the sum of all replicas' tensors of its place."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def mean_over_replicas(values):
    """A nest of tensors -> the nest of their means over the replicas."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)


def variable_per_replica(shape, dtype, name):
    """A variable, zeros at first, of which each replica reads and writes a value of its own by the variable's `handle`.

    Returns:
        (variable, its R values: plain variables, in rank order).

    Raises:
        UsageError: some of the replicas are another process's.
    """
    strategy = tf.distribute.get_strategy()
    variable = tf.Variable(tf.zeros(shape, dtype), trainable=False, name=name,
                           synchronization=tf.VariableSynchronization.ON_READ, aggregation=tf.VariableAggregation.NONE)
    values = strategy.experimental_local_results(variable)
    if len(values) != strategy.num_replicas_in_sync:
        raise UsageError("A variable that differs between replicas must have them all in one process, which saves it. "
                         f"Received: {len(values)} of {strategy.num_replicas_in_sync} replicas here. Use the strategy "
                         "default, mirrored or tpu.")
    return variable, values


def update_copies(update, variables, values):
    """Runs `update(variable, value)` once on every replica's own copy of each variable, without communication.

    The caller vouches that `values` are equal on all replicas. Inside `update`, control flow is allowed.
    """
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        for variable, value in zip(variables, values):
            update(variable, value)
        return

    def everywhere(strategy, variables, values):
        for variable, value in zip(variables, values):
            strategy.extended.update(variable, update, args=(value,), group=False)

    context.merge_call(everywhere, args=(list(variables), list(values)))


def apply_gradients_if(condition, optimizer, gradients, variables):
    """`optimizer.apply_gradients` where `condition`, equal on all replicas, holds; else only the step is counted.

    `gradients` are those of the whole batch already: they are not summed again.
    """
    def apply(gradients):
        optimizer.apply_gradients(zip(gradients, variables), skip_gradients_aggregation=True)
        return tf.constant(True)

    def skip():
        optimizer.iterations.assign_add(1)
        return tf.constant(False)

    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        tf.cond(condition, lambda: apply(gradients), skip)
        return

    def everywhere(strategy, condition, gradients):    # a replica may not branch round a collective; the strategy may
        tf.cond(strategy.experimental_local_results(condition)[0],
                lambda: strategy.reduce("MEAN", strategy.extended.call_for_each_replica(
                    lambda gradients: tf.cast(apply(gradients), tf.float32), args=(gradients,)), axis=None) > 0,
                skip)

    context.merge_call(everywhere, args=(condition, list(gradients)))


class ReplicaOfMany(tf.distribute.Strategy):
    """One of R replicas, alone on one device, for a compiler to look at: its step is traced, never run.

    Inside a step it does what TPUStrategy does: a variable has one copy, which this replica sees, and what is assigned
    to it is aggregated over the replicas first. What the replicas exchange is up to `collective`.

    Args:
        replicas: R.
        collective: (kind, value, shape) -> a tensor of `value`'s dtype and that shape, in the place of an "all-gather"
            of rows, an "all-reduce" by a sum, or an "all-to-all" of one value to each replica.
    """

    def __init__(self, replicas, collective):
        super().__init__(_ReplicaOfMany(self, replicas, collective))

    def trace(self, step, replica, *args):
        """`step(*args)` as the replica of number `replica` (a tensor: the program is the same for all) runs it."""
        with self.scope(), _ReplicaOfManyContext(self, replica):
            return step(*args)


class _ReplicaOfManyContext(tf.distribute.ReplicaContext):
    def all_gather(self, value, axis, options=None):
        @tf.custom_gradient
        def gathered(value):
            def gradient(upstream):
                return own_rows(self.all_reduce(tf.distribute.ReduceOp.SUM, upstream), value.shape[0])

            shape = [self.num_replicas_in_sync * value.shape[0], *value.shape[1:]]
            return self.strategy.extended.collective("all-gather", value, shape), gradient

        return gathered(tf.convert_to_tensor(value))


class _ReplicaOfMany(tf.compat.v1.distribute.StrategyExtended):
    """What TensorFlow asks of a strategy; the names are its own."""

    def __init__(self, strategy, replicas, collective):
        super().__init__(strategy)
        self.replicas, self.collective = replicas, collective

    @property
    def _num_replicas_in_sync(self):
        return self.replicas

    def _create_variable(self, next_creator, **kwargs):
        variable = next_creator(**kwargs)
        for name in ("assign", "assign_add", "assign_sub"):
            setattr(variable, name, self._aggregating(getattr(variable, name), variable.aggregation))
        return variable

    def _aggregating(self, assign, aggregation):
        def of_all(value, *args, **kwargs):
            if not tf.distribute.in_cross_replica_context() and tf.is_tensor(value):
                if aggregation == tf.VariableAggregation.MEAN:
                    value = self._reduce_to(tf.distribute.ReduceOp.MEAN, value, None, None)
                elif aggregation == tf.VariableAggregation.ONLY_FIRST_REPLICA:
                    for_each = tf.stack([value] * self.replicas)
                    value = self.collective("all-to-all", for_each, for_each.shape)[0]
            return assign(value, *args, **kwargs)

        return of_all

    def _call_for_each_replica(self, fn, args, kwargs):
        with _ReplicaOfManyContext(self._container_strategy(), 0):
            return fn(*args, **kwargs)

    def _reduce_to(self, reduce_op, value, destinations, options):
        if reduce_op == tf.distribute.ReduceOp.MEAN:
            value = value * tf.cast(1 / self.replicas, value.dtype)
        return self.collective("all-reduce", value, value.shape)

    def _update(self, var, fn, args, kwargs, group):
        result = fn(var, *args, **kwargs)
        return result if group else (result,)

    def _local_results(self, value):
        return (value,) * self.replicas

    def _get_local_replica_id(self, replica_id_in_sync_group):
        return replica_id_in_sync_group

    def value_container(self, value):
        return value
