"""Files of arrays by name, as PyTorch, safetensors and Detectron2 write and read them; nothing read is executed."""

import argparse
import importlib
import os
import pickle
import re

import numpy as np

from moco_tf.errors import DataError, UsageError

TORCH_FILES = (".pth", ".pth.tar", ".pt")
SAFETENSORS_FILE = ".safetensors"
PICKLE_FILE = ".pkl"    # Detectron2's; written only: reading one would run what it says


def read_state_dict(path):
    """The state dict of a .pth, .pth.tar, .pt or .safetensors file, name -> array. Nothing in the file is executed.

    A file of CMC's code holds more beside its model: what is under `contrast` and `model_ema` comes with this before
    its names, and the option `view`, the colour space, as "opt.view".

    Raises:
        UsageError: another kind of file, or the package that reads it is missing.
        DataError: no such file, or it is broken, or would need more than reading.
    """
    if not path.endswith(TORCH_FILES + (SAFETENSORS_FILE,)):
        raise UsageError("Weights are read from .pth, .pth.tar, .pt or .safetensors. "
                         f"Received: {path}. Rename the file, or convert it first.")
    if not os.path.isfile(path):
        raise DataError(f"The file of weights must exist. Received: {path}.")
    state = _read_safetensors(path) if path.endswith(SAFETENSORS_FILE) else _read_torch(path)
    if not state:
        raise DataError(f"The file must hold arrays by name. Received: {path}, with none.")
    return state


def _read_safetensors(path):
    package = _need("safetensors.numpy")
    try:
        return dict(package.load_file(path))
    except Exception as error:    # a broken file can make the reader fail in any way
        raise DataError(f"The file must be a whole .safetensors file. Received: {path}: {_line(error)}.") from None


def _read_torch(path):
    torch = _need("torch")
    try:
        # CMC's, InsDis' and DeiT's files hold their options in a Namespace: a plain record, which runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:    # a broken file can make the reader fail in any way
        needs = re.search(r"GLOBAL ([\w.]+\w)|Unsupported (operand \d+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and needs:
            raise DataError(
                "A PyTorch file may hold tensors and plain values only, so that reading it runs no code. Received: "
                f"{path}, which asks for {needs[1] or needs[2]}. Save its state dict alone.") from None
        raise DataError(f"The file must be a whole PyTorch file. Received: {path}: {_line(error)}.") from None
    whole = content
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise DataError(f"The file must hold a state dict. Received: {path}, with a {type(content).__name__}.")
    parts, options = _of_cmc(whole)
    return {**{name: (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()
               for name, value in {**content, **parts}.items() if isinstance(value, torch.Tensor)}, **options}


def _of_cmc(whole):
    """What a file of CMC's code holds beside its model: ({name: tensor}, {"opt.view": array}); nothing of others."""
    if not isinstance(whole.get("contrast"), dict):
        return {}, {}
    parts = {f"{part}.{name}": value for part in ("contrast", "model_ema")
             for name, value in (whole.get(part) or {}).items()}
    options = whole.get("opt")
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    view = options.get("view") if isinstance(options, dict) else None
    return parts, {"opt.view": np.array(view)} if view else {}


def write_state_dict(path, state, wrap=lambda state: state):
    """Writes arrays by name; the suffix says the kind of file. No broken file is ever left.

    Args:
        path: ends in .pth, .pth.tar or .pt (PyTorch), .safetensors, or .pkl (a pickled dict of arrays).
        state: name -> array.
        wrap: the state, of tensors in a file of PyTorch -> what the file holds; .safetensors takes the arrays as they
            are.

    Raises:
        UsageError: the package that writes it is missing.
        DataError: the file cannot be written.
    """
    state = {name: np.array(value, order="C") for name, value in state.items()}
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "wb") as file:
            if path.endswith(PICKLE_FILE):
                pickle.dump(wrap(state), file)
            elif path.endswith(SAFETENSORS_FILE):
                file.write(_need("safetensors.numpy").save(state, metadata={"format": "pt"}))
            else:
                torch = _need("torch")
                torch.save(wrap({name: torch.from_numpy(value) for name, value in state.items()}), file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:    # PyTorch turns a full disk into a RuntimeError
        raise DataError(f"The target must be writable. Received: {path}: {_line(error)}.") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def _need(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UsageError(f"This kind of file needs the package {package}, which is not installed. "
                         "Install it: pip install moco_tf[torch]") from None


def _line(error):
    return f"{type(error).__name__} {str(error).strip()}".splitlines()[0].rstrip(". ")
