"""Weights on disk: safetensors files, checked by hash, and laid into a network key by key. Called by `store.py`, by
training and by the predictor. Never reads a pickle; `restricted_pickle.py` does that for the import.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from service.errors import ModelStoreError
from service.model_store.model_toml import Dtype

_CLASS_BIAS = "roi_heads.box_predictor.cls_score.bias"
_LISTED_KEYS = 20


def save_weights(path: Path, state_dict: Mapping[str, Tensor], *, dtype: Dtype = "float32") -> str:
    """Write the weights as safetensors.

    Args:
        path: the file to write; its folder exists.
        state_dict: on any device. Floating-point tensors are stored as `dtype`, others as they are.
        dtype: half precision halves the file; the weights are then rounded.

    Returns:
        The file's sha256 in hexadecimal.

    Raises:
        ModelStoreError: a weight is not a finite number, or does not fit `dtype`.
    """
    tensors = {key: _stored(tensor, getattr(torch, dtype)) for key, tensor in state_dict.items()}
    infinite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise ModelStoreError(f"{path}: expected finite weights that fit {dtype}, got others in {_listing(infinite)}")
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


def load_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read weights, floating-point tensors as float32 on the CPU, others as stored.

    Raises:
        ModelStoreError: missing, not safetensors, truncated, or its sha256 is another; the message says which.
    """
    check_safetensors(path)
    digest = sha256_of(path)
    if digest != sha256:
        raise ModelStoreError(f"{path}: the file was changed: expected sha256 {sha256}, got {digest}")
    return read_safetensors(path)


def sha256_of(path: Path) -> str:
    """A file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file whose hash nobody knows, as `load_weights` does otherwise.

    Raises:
        ModelStoreError: missing, not safetensors, or truncated.
    """
    check_safetensors(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ModelStoreError(f"{path}: not valid safetensors: {error}") from error
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def read_shapes(path: Path) -> dict[str, Tensor]:
    """What the file's header says of the weights: tensors without memory, by name.

    Raises:
        ModelStoreError: missing, not safetensors, or truncated.
    """
    check_safetensors(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelStoreError(f"{path}: not valid safetensors: {error}") from error


def check_safetensors(path: Path) -> None:
    """Check by its header that the file is safetensors and complete; cheap, and blind to changed weights.

    Raises:
        ModelStoreError: missing, not safetensors, or truncated.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            header_size = int.from_bytes(file.read(8), "little")
            # A pickle's or a text's first bytes make a number far beyond the file's size.
            header = file.read(header_size) if header_size <= size else b""
        tensors = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        expected_size = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except FileNotFoundError:
        raise ModelStoreError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelStoreError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelStoreError(f"{path}: expected a safetensors file, got {_kind(path)}") from None
    if size != expected_size:
        problem = "truncated" if size < expected_size else "longer than its header says"
        raise ModelStoreError(f"{path}: {problem}: expected {expected_size:,} bytes, got {size:,}")


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    if start in (b"PK", b"\x80\x02", b"\x80\x04"):
        return "what looks like a PyTorch checkpoint (`roiserve models import` converts it)"
    return "an empty file" if not start else "something else, or only the beginning of one"


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str) -> None:
    """Lay weights into a network; every key and every shape has to agree.

    Args:
        model: its parameters and buffers are overwritten; left as it was when this raises.
        state_dict: `num_batches_tracked` of batch norms may be there or not; only training counts with it.
        source: what the weights came from, for the message.

    Raises:
        ModelStoreError: lists the missing keys, the surplus keys and the differing shapes.
    """
    check_fit(model, state_dict, source=source)
    known = model.state_dict().keys()
    model.load_state_dict({key: tensor for key, tensor in state_dict.items() if key in known})


def check_fit(model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str) -> None:
    """Check as `load_into` does, and lay nothing into the network. Of both only names and shapes are looked at.

    Raises:
        ModelStoreError: see `load_into`.
    """
    expected = {key: tensor for key, tensor in model.state_dict().items() if not _is_optional(key)}
    given = {key: tensor for key, tensor in state_dict.items() if not _is_optional(key)}
    problems = [
        *_class_count_problem(expected, given),
        *_key_problem("missing", expected.keys() - given.keys()),
        *_key_problem("surplus", given.keys() - expected.keys()),
        *_shape_problem(expected, given),
    ]
    if problems:
        raise ModelStoreError("\n  ".join([f"{source}: the weights do not fit the network", *problems]))


def _is_optional(key: str) -> bool:
    return key.endswith(".num_batches_tracked")


def _class_count_problem(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    if _CLASS_BIAS not in expected or _CLASS_BIAS not in given:
        return []
    labels, came = len(expected[_CLASS_BIAS]) - 1, len(given[_CLASS_BIAS]) - 1
    if labels == came:
        return []
    return [
        f"wrong class count: expected weights for {labels} labels and the background, got {came} and the background"
    ]


def _key_problem(kind: str, keys: Iterable[str]) -> list[str]:
    listed = sorted(keys)
    return [f"{kind}: {_listing(listed)}"] if listed else []


def _shape_problem(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    differing = [
        f"{key} (expected {tuple(expected[key].shape)}, got {tuple(given[key].shape)})"
        for key in sorted(expected.keys() & given.keys())
        if expected[key].shape != given[key].shape
    ]
    return [f"other shape: {_listing(differing)}"] if differing else []


def _listing(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more
