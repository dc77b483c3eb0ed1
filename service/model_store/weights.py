"""Weights on disk: safetensors files, verified by hash and loaded into a network key by key. Never reads a pickle.

Weights may be stored in int8: then `<key>` is an int8 tensor, and `<key>.int8_scale` holds a float32 factor for each of
its rows, its first dimension. Whoever reads them gets the products, in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from service.errors import ModelStoreError
from service.model_store.files import check_safetensors, sha256_of
from service.model_store.model_toml import Dtype

_CLASS_BIAS = "roi_heads.box_predictor.cls_score.bias"
_LISTED_KEYS = 20
_SCALE = ".int8_scale"
_LARGEST_INT8 = 127


def save_weights(
    path: Path, state_dict: Mapping[str, Tensor], *, dtype: Dtype = "float32", in_int8: Collection[str] = ()
) -> str:
    """Write the weights as safetensors.

    Args:
        path: the file to write; its folder exists.
        state_dict: on any device. Floating-point tensors are stored as `dtype`, others unchanged.
        dtype: half precision halves the file; the weights are then rounded.
        in_int8: the keys of weights that are stored in int8 instead.

    Returns:
        The file's sha256 in hexadecimal.

    Raises:
        ModelStoreError: a weight is not a finite number, or does not fit `dtype`.
    """
    data = _serialised(state_dict, dtype=dtype, source=str(path), in_int8=in_int8)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def serialised_sha256(state_dict: Mapping[str, Tensor], *, dtype: Dtype, source: str) -> str:
    """The sha256 of the file that `save_weights` would write.

    Args:
        source: what the weights came from, for the message.

    Raises:
        ModelStoreError: as `save_weights`.
    """
    return hashlib.sha256(_serialised(state_dict, dtype=dtype, source=source)).hexdigest()


def _serialised(state_dict: Mapping[str, Tensor], *, dtype: Dtype, source: str, in_int8: Collection[str] = ()) -> bytes:
    tensors: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if key in in_int8:
            tensors[key], tensors[key + _SCALE] = _in_int8(tensor)
        else:
            tensors[key] = _stored(tensor, getattr(torch, dtype))
    infinite = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise ModelStoreError(f"{source}: expected finite weights that fit {dtype}, got others in {_listing(infinite)}")
    return safetensors.torch.save(tensors, metadata={"format": "pt"})


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(dtype)
    # A separate copy: safetensors rejects tensors that share memory.
    return tensor.clone(memory_format=torch.contiguous_format)


def rounded_to_int8(weights: Tensor) -> Tensor:
    """The weights as they come back from int8: each row (its first dimension) to 255 levels."""
    return _times_scale(*_in_int8(weights))


def _in_int8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """int8 of the same shape, and a factor for each row."""
    rows = weights.detach().cpu().float()
    scale = rows.flatten(start_dim=1).abs().amax(dim=1) / _LARGEST_INT8
    # A row of zeros keeps them with any factor.
    scale = torch.where(scale > 0, scale, 1.0)
    rounded = (rows / _of_rows(scale, rows)).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return rounded.to(torch.int8).contiguous(), scale


def _times_scale(weights: Tensor, scale: Tensor) -> Tensor:
    return weights.float() * _of_rows(scale, weights)


def _of_rows(scale: Tensor, weights: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weights.ndim - 1))


def without_scales(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes in a file's header without those that belong to weights in int8: what `read_safetensors` returns."""
    return {key: shape for key, shape in shapes.items() if not key.endswith(_SCALE)}


def load_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read weights, floating-point tensors as float32 on the CPU, others as stored.

    Raises:
        ModelStoreError: missing, not safetensors, truncated, or the sha256 differs; the message says which.
    """
    check_safetensors(path)
    digest = sha256_of(path)
    if digest != sha256:
        raise ModelStoreError(f"{path}: the file was changed: expected sha256 {sha256}, got {digest}")
    return read_safetensors(path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Like `load_weights`, for a safetensors file whose hash is not known.

    Raises:
        ModelStoreError: missing, not safetensors, or truncated.
    """
    check_safetensors(path)
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ModelStoreError(f"{path}: not valid safetensors: {error}") from error
    scales = {key.removesuffix(_SCALE): tensors.pop(key) for key in list(tensors) if key.endswith(_SCALE)}
    for key, scale in scales.items():
        weights = tensors.get(key)
        if weights is None or weights.dtype != torch.int8 or scale.shape != weights.shape[:1]:
            raise ModelStoreError(f"{path}: expected weights in int8 that {key}{_SCALE} fits, got others")
        tensors[key] = _times_scale(weights, scale.float())
    if unscaled := [key for key, tensor in tensors.items() if tensor.dtype == torch.int8]:
        raise ModelStoreError(f"{path}: expected a scale for each weight in int8, got none for {_listing(unscaled)}")
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights into a network; every key and every shape must match.

    Args:
        model: its parameters and buffers are overwritten; unchanged if this raises.
        state_dict: batch norms' `num_batches_tracked` is optional; only training uses it.
        source: what the weights came from, for the message.

    Raises:
        ModelStoreError: lists the missing keys, the surplus keys and the differing shapes.
    """
    check_fits(model, {key: tuple(tensor.shape) for key, tensor in state_dict.items()}, source=source)
    known = model.state_dict().keys()
    model.load_state_dict({key: tensor for key, tensor in state_dict.items() if key in known})


def check_fits(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Check that weights of these shapes match the network, every key and every shape. Reads no weights, so the network
    may be on the device `meta`, which uses no memory.

    Raises:
        ModelStoreError: as `load_into`.
    """
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if not _is_optional(key)}
    given = {key: shape for key, shape in shapes.items() if not _is_optional(key)}
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


def _class_count_problem(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    if _CLASS_BIAS not in expected or len(given.get(_CLASS_BIAS, ())) != 1:
        return []
    labels, came = expected[_CLASS_BIAS][0] - 1, given[_CLASS_BIAS][0] - 1
    if labels == came:
        return []
    return [
        f"wrong class count: expected weights for {labels} labels and the background, got {came} and the background"
    ]


def _key_problem(kind: str, keys: Iterable[str]) -> list[str]:
    listed = sorted(keys)
    return [f"{kind}: {_listing(listed)}"] if listed else []


def _shape_problem(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> list[str]:
    differing = [
        f"{key} (expected {expected[key]}, got {given[key]})"
        for key in sorted(expected.keys() & given.keys())
        if expected[key] != given[key]
    ]
    return [f"other shape: {_listing(differing)}"] if differing else []


def _listing(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    return ", ".join(keys[:_LISTED_KEYS]) + more
