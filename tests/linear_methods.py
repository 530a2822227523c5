"""What the tests of methods share: an encoder of one linear layer, whose losses and gradients NumPy can tell, batches
for it, and steps on several replicas."""

import contextlib

import numpy as np
import tensorflow as tf

from moco_tf.normalization import BatchNorm
from moco_tf.optim.sgd import SGD

keras = tf.keras

SIZE, DIM = 4, 16    # of images, (N, 4, 4, 3), and of embeddings


def linear_encoder(branches=1, dim=DIM, seed=0, norm_group=0):
    """Images -> embeddings, (N, branches * dim), if asked for normalised over groups of images."""
    images = keras.Input((SIZE, SIZE, 3))
    initializer = keras.initializers.RandomNormal(stddev=0.1, seed=seed)
    embedding = keras.layers.Dense(branches * dim, use_bias=False, kernel_initializer=initializer, name="embedding")
    embeddings = embedding(keras.layers.Flatten()(images))
    if norm_group:
        embeddings = BatchNorm(norm_group, name="norm")(embeddings)
    return keras.Model(images, embeddings, name="encoder")


def compiled(method, lr=0.1):
    """The method with plain SGD at this rate, so that a weight moves by lr times its gradient."""
    method.compile(optimizer=SGD(lr, momentum=0.0))
    method.optimizer.build(method.trainable_weights)
    return method


def batch(step=0, images=8, names=("query", "key"), bank_size=40):
    """Views that are somewhat alike, in their own order; "key_position" and "index" besides."""
    rng = np.random.default_rng(step)
    base = rng.normal(size=(images, SIZE, SIZE, 3))
    views = {name: tf.constant(base + 0.5 * rng.normal(size=base.shape), keras.backend.floatx()) for name in names}
    return {**views, "key_position": tf.range(images), "index": tf.constant(rng.permutation(bank_size)[:images])}


@contextlib.contextmanager
def float64():
    """Models built inside, and their steps, are whole in float64."""
    keras.backend.set_floatx("float64")
    keras.mixed_precision.set_global_policy("float64")
    try:
        yield
    finally:
        keras.backend.set_floatx("float32")
        keras.mixed_precision.set_global_policy("float32")


def state(method):
    return {name: variable.numpy() for name, variable in variables_of(method).items()}


def variables_of(method):
    """All of a method and of its optimizer, by number and name: both encoders have the same names."""
    variables = [*method.weights, *method.optimizer.variables]
    return {f"{i} {variable.name}": variable for i, variable in enumerate(variables)}


def strategy_of(replicas):
    """One replica, or several on the CPU; without collective kernels, whose keys clash between strategies."""
    if replicas == 1:
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy([f"/cpu:{i}" for i in range(replicas)],
                                          cross_device_ops=tf.distribute.ReductionToOneDevice())


def dealt(strategy, views):
    """Views of the global batch -> each replica's share."""
    share = views["query" if "query" in views else "view_1"].shape[0] // strategy.num_replicas_in_sync
    return {name: strategy.experimental_distribute_values_from_function(
        lambda context, view=view: view[context.replica_id_in_sync_group * share:][:share])
        for name, view in views.items()}


def train(build, batches, replicas=1):
    """{name: value} of the losses and, after steps on these global batches, of all variables, which must be equal on
    all replicas."""
    strategy = strategy_of(replicas)
    with strategy.scope():
        method = build()
        step_of_all = tf.function(lambda views: strategy.run(method.train_step, args=(views,)), autograph=False)
        losses = [float(strategy.experimental_local_results(step_of_all(dealt(strategy, views))["loss"])[0])
                  for views in batches]
    values = {"losses": losses}
    for name, variable in variables_of(method).items():
        first, *others = (copy.numpy() for copy in strategy.experimental_local_results(variable))
        assert len(others) == replicas - 1 and all(np.array_equal(first, other) for other in others), name
        values[name] = first
    return values


def assert_replicas_train_as_one(build, batches):
    """On 1, 2 and 4 replicas, in float64; `batches` and `build` are functions, called in that precision."""
    with float64():
        one, *several = (train(build, batches(), replicas) for replicas in (1, 2, 4))
    for values in several:
        assert values.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(values[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def assert_compiles_and_agrees(build, batches):
    """The step under XLA makes the losses and weights of the plain one."""
    methods = [build(), build()]
    plain = tf.function(methods[0].train_step, autograph=False)
    compiled_step = tf.function(methods[1].train_step, autograph=False, jit_compile=True)
    for views in batches:
        np.testing.assert_allclose(plain(views)["loss"], compiled_step(views)["loss"], rtol=1e-5)
    one, other = map(state, methods)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)


# --- NumPy ---


def kernel_of(encoder):
    return encoder.get_weights()[0].astype(np.float64)


def flat(images):
    return np.reshape(np.asarray(images, np.float64), (len(images), -1))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def unit_branches(rows, branches):
    return [unit(part) for part in np.split(rows, branches, axis=1)]


def cross_entropy(logits, positive):
    """(N,) nats of the softmax of each row against its positive, (N,) columns."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(logits)), positive]
