"""What is here, what would be used, and whether it works."""

import importlib.metadata
import os
import platform
import sys
import time

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.distribute import first_row, make_strategy
from moco_tf.errors import UsageError

PACKAGES = ("moco_tf", "tensorflow", "tensorflow-datasets", "tensorflow-addons", "numpy", "ml-collections", "absl-py")
OPTIONAL = {"torch": "convert .pth files", "safetensors": "convert .safetensors", "matplotlib": "plots",
            "scikit-learn": "maps of features"}


def examine(strategy_name="auto", cpu_replicas=0, tpu=""):
    """Prints versions, devices and the strategy, and takes two training steps on it.

    Raises:
        UsageError: the strategy cannot be had, or the steps fail; the message says what would mend it.
    """
    print(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores")
    for name in PACKAGES:
        print(f"  {name} {_version(name) or 'MISSING: pip install ' + name}")
    for name, use in OPTIONAL.items():
        print(f"  {name} {_version(name) or f'not installed (optional: {use})'}")
    if not (3, 9) <= sys.version_info[:2] <= (3, 11):
        print("! Python 3.9 to 3.11 is needed: TensorFlow 2.15 has no build for another")
    strategy, reason = make_strategy(strategy_name, cpu_replicas, tpu)
    gpus = tf.config.list_physical_devices("GPU")
    for device in gpus:
        details = tf.config.experimental.get_device_details(device)
        print(f"GPU {device.name}: {details.get('device_name', 'unknown')}")
    if not gpus and os.path.exists("/proc/driver/nvidia"):
        print("! an NVIDIA driver is here but TensorFlow sees no GPU: pip install 'moco_tf[gpu]' in this environment")
    print(f"strategy: {reason}; {strategy.num_replicas_in_sync} replica(s)")
    print(f"oneDNN: {'on' if os.environ.get('TF_ENABLE_ONEDNN_OPTS', '1') == '1' else 'off (slow on most CPUs)'}")
    try:
        seconds = _two_steps(strategy)
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise UsageError(f"Two training steps must run on {reason}. Received: {str(error).splitlines()[0]}. Try "
                         "--strategy=default; on a GPU check the driver and that nothing else fills its memory.") from None
    print(f"two training steps: fine (first {seconds[0]:.1f} s with compilation, second {seconds[1]:.3f} s)")


def _two_steps(strategy):
    from moco_tf.train import build_method, normalizer, set_precision, view_recipe    # heavy: only once all else is fine

    config = configs.load("smoke")
    set_precision(config.precision)
    batch = config.batch_size // strategy.num_replicas_in_sync * strategy.num_replicas_in_sync
    here = batch // strategy.num_replicas_in_sync
    config = configs.override(config, batch_size=batch, bn_group_size=here)
    with strategy.scope():
        method = build_method(config, steps_per_epoch=1, normalize_views=normalizer(view_recipe(config)))
    size = config.views.size
    images = tf.cast(tf.random.stateless_uniform([here, size, size, 3], (0, 0), 0, 256, tf.int32), tf.uint8)

    def one_replica():
        return method.train_step({"query": images, "key": images, "key_position": first_row(here) + tf.range(here)})

    step = tf.function(lambda: strategy.run(one_replica))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        tf.nest.map_structure(lambda value: strategy.experimental_local_results(value)[0].numpy(), step())
        seconds.append(time.perf_counter() - began)
    return seconds


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
