"""What several replicas change: the strategy, and the few collectives. Everything else is written for one replica."""

import tensorflow as tf

from moco_tf.errors import UsageError

STRATEGIES = ("auto", "default", "mirrored")


def set_intra_op_threads(count):
    """CPU threads within one operation; to be called before TensorFlow starts its devices. 0 leaves it to TensorFlow.

    With 1, small operations do not wait for each other's threads, and independent ones (the two encoders) still run
    side by side.
    """
    if count:
        tf.config.threading.set_intra_op_parallelism_threads(count)


def make_strategy(name="auto", cpu_replicas=0):
    """The `tf.distribute` strategy of a name, and a sentence that says why it is this one.

    Args:
        name: "auto", "default" (one device) or "mirrored" (every local GPU, or `cpu_replicas` logical CPU devices).
        cpu_replicas: > 0 splits the CPU into so many logical devices, one replica each: the same mathematics as so
            many GPUs. It must be asked for before TensorFlow has started its devices.

    Returns:
        (strategy, reason).

    Raises:
        UsageError: unknown name; more CPU replicas asked for than the started runtime has.
    """
    if name not in STRATEGIES:
        raise UsageError(f"The strategy must be one of {', '.join(STRATEGIES)}. Received: {name!r}.")
    if cpu_replicas > 1:
        if name == "default":
            raise UsageError("The default strategy has one replica. Received: strategy 'default' with "
                             f"cpu_replicas={cpu_replicas}. Use --strategy=mirrored.")
        _split_cpu(cpu_replicas)
        devices = [f"/cpu:{i}" for i in range(cpu_replicas)]
        return tf.distribute.MirroredStrategy(devices), f"mirrored over {cpu_replicas} logical CPU devices, as asked"
    gpus = tf.config.list_physical_devices("GPU")
    if name == "mirrored" or (name == "auto" and len(gpus) > 1):
        strategy = tf.distribute.MirroredStrategy()
        return strategy, f"mirrored over {strategy.num_replicas_in_sync} device(s)"
    return tf.distribute.get_strategy(), "default: " + ("one GPU" if gpus else "no GPU here, the CPU")


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
    gathered = context.all_gather(rows, axis=0)
    gathered.set_shape([context.num_replicas_in_sync * rows.shape[0], *rows.shape[1:]])
    return gathered


def first_row(rows_per_replica):
    """Where the rows of this replica begin among the gathered ones."""
    return tf.distribute.get_replica_context().replica_id_in_sync_group * rows_per_replica


def mean_over_replicas(values):
    """A nest of tensors -> the nest of their means over the replicas."""
    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.MEAN, values)


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
