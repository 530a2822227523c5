"""Recipes and configs: found by name from anywhere, completed, checked, written into the workdir, compared on resume.

A config is one `ConfigDict`. A recipe in `configs/` holds the numbers that its paper chose; what is left (precision,
logging, checkpoints, monitors) has the defaults of RUN_DEFAULTS and can be overridden like any other key.
"""

import ast
import difflib
import hashlib
import importlib.util
import json
import pathlib

from ml_collections import ConfigDict

from moco_tf.errors import UsageError

RUN_DEFAULTS = dict(
    seed=0,
    bn_group_size=32,            # images that share batch statistics; 0: each replica's whole batch
    branches=(),                 # ((name, channels), ...): an encoder for each; (): one for the whole image
    shuffle_bn="input",          # "input": in the pipeline; "cross_replica": inside the step; "none"
    precision="float32",         # "float32", "bfloat16" or "float16" (with loss scaling)
    jit_compile=False,           # compile the whole step by XLA: for accelerators
    steps_per_execution=1,
    intra_op_threads=0,          # CPU threads within one operation; 0: TensorFlow's choice. Small networks want 1
    max_bad_steps=20,            # non-finite steps in a row before the run stops
    data=dict(
        path="", split="train", data_dir="",
        channels=3,              # of an image; other than 3 of PNG files (1, 2, 4), tfds and arrays
        classes=(),              # of a folder: the class folders to keep; () for all
        feature="",              # of tfds: the image's name in an example; "" for "image"
        download=False,          # of tfds: prepare the data first where they are not
        eval_split="",           # held-out images for the monitors; "": the source's usual one, or a part set apart
        holdout=0.02,            # the part set apart where there is no such split
        fraction=1.0,            # of the training images; below 1 the same share of each class
        device_views=False,      # of pre-training: the step does what follows the crop, for hosts that are too slow
        normalize="step",        # of pre-training: first in the step, or "input": in the pipeline (4 times the bytes)
        repeats=1,               # views of an image that follow each other (repeated augmentation)
        max_unreadable=0.01,     # of the images; above it the run stops
        workers=0),              # parallel calls of each part of the pipeline; 0: by the number of cores
    mixture=dict(name="none"),   # image mixtures of pre-training; in the pipeline: views/image_mixture.py
    optimizer=dict(clip_norm=0.0),    # > 0: global norm that gradients are scaled down to
    schedule=dict(),
    checkpoint=dict(every_steps=1000, keep=2),
    log=dict(every_steps=50, tensorboard=True, embeddings=False),
    monitor=dict(
        every_epochs=5,          # 0: at the start and the end only
        k=20, temperature=0.1, bank=10000, queries=2000,
        features="backbone"),    # or "embedding": the rows that vote,
)


def recipe_folder():
    """Where the recipes are: inside an installed package, or beside it in a checkout."""
    here = pathlib.Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def recipes():
    """{name: path} of all recipes, in order of name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("*.py")) if not path.stem.startswith("_")}


def describe(path):
    """The docstring of a recipe's file, read without running it."""
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def load(name):
    """The complete config of a recipe's name, of a .py file with `get_config`, or of a run's config.json.

    Raises:
        UsageError: nothing of that name; a file that holds no config.
    """
    known = recipes()
    path = known.get(name, pathlib.Path(name).expanduser())
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"Nearest recipes: {', '.join(near)}." if near else "`moco-tf recipes` lists them."
        raise UsageError(f"--config takes a recipe's name, a .py file or a config.json. Received: {name!r}. {hint}")
    if path.suffix == ".json":
        try:
            return from_json(path.read_text())
        except ValueError as error:
            raise UsageError(f"{path} must hold a config as JSON. Received: {error}.") from None
    return complete(_from_file(path))


def recipe(name):
    """What the recipe of that name holds, for another one to change."""
    return _from_file(recipes()[name])


def complete(own):
    """A recipe's own values over RUN_DEFAULTS, as a locked, typed config."""
    config = ConfigDict(RUN_DEFAULTS)
    config.update(own)
    return config.lock()


def _from_file(path):
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UsageError(f"A recipe must define get_config(). Received: {path}, which does not.")
    return module.get_config()


def override(config, **values):
    """A copy with dotted keys set, as the command line does: override(config, **{"data.path": "/data"})."""
    config = config.copy_and_resolve_references()
    for key, value in values.items():
        refuse_unknown(config, key)
        config.update_from_flattened_dict({key: value})
    return config


def with_option(config, key, text):
    """A copy with a key that the recipe leaves out, its value written as in Python; what is no such value is a string."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    config = config.copy_and_resolve_references().unlock()
    config.update_from_flattened_dict({key: value})
    return config.lock()


def refuse_unknown(config, key):
    """Raises UsageError, naming the nearest keys, when `config` has no key of this dotted name."""
    known = flatten(config)
    sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
    if key in known or key in sections:
        return
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or \
        [name for name in known if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    section = key.rsplit(".", 1)[0]
    siblings = [name for name in known if "." in key and name.startswith(section + ".")]
    hint = f"Nearest: {', '.join(near)}." if near else f"There are: {', '.join(siblings or sorted(known))}."
    raise UsageError(f"The config has no key {key!r}. {hint}")


def flatten(config):
    """{dotted key: value}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            flat.update({f"{key}.{inner}": v for inner, v in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config):
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text):
    """The config of to_json's text; keys that RUN_DEFAULTS has gained since have their defaults."""
    def tuples(value):    # JSON has no tuples, and a config no lists
        if isinstance(value, dict):
            return {key: tuples(inner) for key, inner in value.items()}
        return tuple(tuples(inner) for inner in value) if isinstance(value, list) else value

    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return complete(tuples(values))


def digest(config):
    """Twelve hexadecimal digits that tell one config from another."""
    return hashlib.sha256(to_json(config).encode()).hexdigest()[:12]


def differences(stored, given):
    """Sentences "key: stored a, given b", one for each key that differs."""
    ours, theirs = flatten(stored), flatten(given)
    keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
    return [f"{key}: stored {ours.get(key, 'nothing')!r}, given {theirs.get(key, 'nothing')!r}" for key in keys]
