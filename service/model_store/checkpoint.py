"""Reads the checkpoints that people have into one plain state dict: safetensors, PyTorch's `.pth` and detectron2's
`.pkl`, wrapped and prefixed as training scripts leave them. Called by `importing.py`. Runs no code from the file.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.pickle_reader import read_pickle
from service.model_store.weights import read_safetensors

_WRAPPERS = ("model", "state_dict", "model_state_dict")
_AVERAGED = ("model_ema", "ema", "state_dict_ema", "ema_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
_ZIP = b"PK\x03\x04"
# What `torch.save` wrote before it wrote zip archives begins with this pickled number.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"


def read_checkpoint(path: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """The weights in a checkpoint by name, floating-point tensors as float32, on the CPU.

    `{"model": …}` and its like are unwrapped, the prefixes `module.`, `_orig_mod.` and `model.` taken off.

    Args:
        averaged: take the weights averaged over training, `model_ema` and its like. Those are also taken where there
            are no others.

    Raises:
        ModelStoreError: missing, empty, of no kind that we read, damaged, with Python objects other than weights, or
            without the averaged weights that were asked for.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY_TORCH))
    except OSError as error:
        raise ModelStoreError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise ModelStoreError(f"{path}: expected a checkpoint, got an empty file")
    if start.startswith(_ZIP) or start == _LEGACY_TORCH:
        content = _read_torch(path)
    elif start.startswith(_PICKLE):
        content = _read_pickle(path)
    else:
        content = read_safetensors(path)
    return _without_prefixes(_state_dict(path, content, averaged=averaged))


def _read_torch(path: Path) -> Any:
    try:
        # torchvision's reference scripts save their command line, an `argparse.Namespace`, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        found = f"{named[1]}, which was not run" if named else "other Python objects"
        raise ModelStoreError(
            f"{path}: expected a checkpoint of tensors, got {found}; save `model.state_dict()` alone"
        ) from error
    except Exception as error:  # torch raises a RuntimeError, EOFError, KeyError, … by where the file is damaged
        if "TorchScript" in str(error):
            raise ModelStoreError(
                f"{path}: expected a checkpoint of tensors, got a TorchScript program; save `model.state_dict()` alone"
            ) from error
        raise ModelStoreError(f"{path}: damaged, or no checkpoint: {_first_line(error)}") from error


def _read_pickle(path: Path) -> Any:
    try:
        return read_pickle(path.read_bytes())
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error


def _state_dict(path: Path, content: Any, *, averaged: bool) -> dict[str, Tensor]:
    if averaged and _wrapped(content, _AVERAGED) is None:
        raise ModelStoreError(f"{path}: expected averaged weights as one of {', '.join(_AVERAGED)}, got none")
    first, second = (_AVERAGED, _WRAPPERS) if averaged else (_WRAPPERS, _AVERAGED)
    while (inner := _wrapped(content, (*first, *second))) is not None:
        content = inner
    if not isinstance(content, Mapping) or not content:
        raise ModelStoreError(f"{path}: expected weights by name, got {type(content).__name__}")
    # `torch.optim.swa_utils.AveragedModel` counts what it has averaged.
    content = {key: value for key, value in content.items() if key != "n_averaged"}
    others = [f"{key} ({type(value).__name__})" for key, value in content.items() if not _is_weight(key, value)]
    if others:
        raise ModelStoreError(f"{path}: expected nothing but weights by name, got {', '.join(others[:10])}")
    return {key: _tensor(value) for key, value in content.items()}


def _wrapped(content: Any, keys: Sequence[str]) -> Mapping[Any, Any] | None:
    """What the first of the keys that there is holds."""
    if not isinstance(content, Mapping):
        return None
    return next((content[key] for key in keys if isinstance(content.get(key), Mapping)), None)


def _is_weight(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor | np.ndarray)


def _tensor(value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
    return tensor.float() if tensor.is_floating_point() else tensor


def _without_prefixes(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in state_dict)), None)
    if prefix is None:
        return state_dict
    return _without_prefixes({key.removeprefix(prefix): tensor for key, tensor in state_dict.items()})


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
