"""Reads common checkpoints into one plain state dict: safetensors, whole or in shards, PyTorch's `.pth` and
detectron2's `.pkl`, with the wrappers and prefixes that training scripts add. Runs no code from the file.
"""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.files import open_regular
from service.model_store.pickle_reader import Unread, array_of, described, read_pickle
from service.model_store.torch_reader import LEGACY_START, read_torch_legacy, read_torch_zip, tensor_of
from service.model_store.weights import read_safetensors

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_WRAPPERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "weights",
    "detector",
    "module",
)
"""Keys that are preferred if several hold weights; weights under other keys are found too."""
_AVERAGED = re.compile(
    r"(?:^|[._-])(?:ema|averaged?|avg|swa|teacher|polyak|shadow)(?:$|[._-])|^module_ema|_ema$", re.IGNORECASE
)
# Names that identify a detector, after any prefix: torchvision's and detectron2's, and mmdetection's.
_DETECTOR = re.compile(
    r"(?:^|\.)((?:roi_heads\.box_predictor\.(?:\d+\.)?cls_score|(?:roi_head\.)?bbox_head\.(?:\d+\.)?fc_cls)\.(?:weight|bias))$"
)
_ROOTS = frozenset(
    {
        "backbone",
        "rpn",
        "roi_heads",
        "transform",
        "proposal_generator",
        "pixel_mean",
        "pixel_std",
        "anchor_generator",
        "neck",
        "rpn_head",
        "roi_head",
        "bbox_head",
        "mask_head",
        "data_preprocessor",
    }
)
"""First parts of the names of a detector's weights. Other tensors beside them do not belong to the detector."""
_LABEL_KEYS = ("classes", "class_names", "labels", "label_names", "names", "categories", "thing_classes", "id2label")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.(?:safetensors|bin|pth?)$")
_KINDS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, such as Keras and Matterport's Mask R-CNN write"),
    (b"\x1f\x8b", "a file compressed by gzip: unpack it first"),
    (b"version https://git-lfs", "a pointer of Git LFS: the weights themselves were not fetched (git lfs pull)"),
    (b"\x93NUMPY", "a NumPy array: only PyTorch's weights are read"),
    (b"<", "an HTML or XML page: the download was probably answered with an error"),
)
_SAMPLE_BYTES = 512


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """The contents of a checkpoint file.

    Attributes:
        weights: by name, floating-point tensors as float32, on the CPU; prefixes removed.
        found_at: the keys and the prefix under which they were found, `""` if at the top level.
        left_out: names of tensors that do not belong to the detector.
        labels: every list in the file, beside the weights, that may hold class names.
        config_text: the configuration that mmdetection writes into its files; empty if there is none.
    """

    weights: dict[str, Tensor]
    found_at: str = ""
    left_out: tuple[str, ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()
    config_text: str = field(default="", repr=False)


def read_checkpoint(path: Path, *, averaged: bool = False) -> Checkpoint:
    """Read the weights in a file, under any keys and any prefix.

    Args:
        averaged: take the weights averaged over training, such as `model_ema`. These are also taken if there are no
            others.

    Raises:
        ModelStoreError: the file is missing, empty, of an unknown kind or damaged; or it has no weights, weights of
            several detectors, or not the requested averaged weights.
    """
    content = _content_of(path)
    try:
        return _found_in(content, averaged=averaged)
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error


def _content_of(path: Path) -> Any:
    """The contents of the file, before tensors are created."""
    with open_regular(path) as file:
        start = file.read(_SAMPLE_BYTES)
    if not start:
        raise ModelStoreError(f"{path}: expected a checkpoint, got an empty file")
    if start[8:9] == b"{":
        _refuse_a_shard(path)
        return read_safetensors(path)
    try:
        if start.startswith(_ZIP):
            return read_torch_zip(path)
        if start.startswith(LEGACY_START):
            with path.open("rb") as file:
                return read_torch_legacy(file)
        if start.startswith(_PICKLE):
            with path.open("rb") as file:
                return read_pickle(file)
        if start.lstrip()[:1] == b"{":
            return _read_shards(path)
    except ModelStoreError as error:
        raise ModelStoreError(f"{path}: {error}") from error
    raise ModelStoreError(
        f"{path}: expected a checkpoint (.pth, .safetensors or detectron2's .pkl), got {_kind(path, start)}"
    )


def _kind(path: Path, start: bytes) -> str:
    """What kind of file it is, if not a checkpoint, in a few words."""
    for magic, words in _KINDS:
        if start.lstrip().startswith(magic):
            return words
    if path.suffix == ".onnx" or (start[:1] == b"\x08" and re.search(rb"pytorch|onnx|tf2onnx", start[:64])):
        return "an ONNX program: import the weights that it was made of"
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if all(byte >= 0x20 or byte in b"\t\n\r" for byte in start):
        return "a text"
    return "something else, or only a part of one"


def _refuse_a_shard(path: Path) -> None:
    if _SHARD.search(path.name):
        stem = _SHARD.sub("", path.name)
        raise ModelStoreError(
            f"{path}: expected whole weights, got one of several shards; give the file that lists them, such as "
            f"{stem}{path.suffix}.index.json"
        )


def _read_shards(path: Path) -> dict[str, Any]:
    """The weights of an index `{"weight_map": {name: file}}`, whose files are beside it."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelStoreError('expected an index of shards, {"weight_map": {…}}, got another JSON text') from error
    outside = [file for file in files if not isinstance(file, str) or Path(file).name != file]
    if outside:
        raise ModelStoreError(f"expected shards beside the index, got {outside[0]!r:.80}")
    weights: dict[str, Any] = {}
    for file in files:
        shard = path.with_name(file)
        if not shard.exists():
            raise ModelStoreError(f"the shard {file} is not beside the index")
        content = read_safetensors(shard) if shard.suffix == ".safetensors" else _content_of(shard)
        if not isinstance(content, Mapping):
            raise ModelStoreError(f"the shard {file} holds no weights by name")
        weights |= {key: value for key, value in content.items() if weight_map.get(key) == file}
    missing = [key for key in weight_map if key not in weights]
    if missing:
        raise ModelStoreError(f"the shards lack what the index promises: {', '.join(missing[:10])}")
    return weights


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A set of weights somewhere in a file.

    Attributes:
        path: the keys that lead to the mapping.
        prefix: prefix of the names, with a dot at the end, or empty.
    """

    content: Mapping[Any, Any]
    path: tuple[str, ...]
    prefix: str

    @property
    def is_averaged(self) -> bool:
        return any(_AVERAGED.search(part) for part in (*self.path, *self.prefix.split(".")))

    @property
    def place(self) -> str:
        return ".".join((*self.path, self.prefix)).strip(".")

    def rank(self) -> tuple[int, ...]:
        """Sort key among several candidates: outer ones come before inner ones, well-known keys before others."""
        known = [_WRAPPERS.index(key) if key in _WRAPPERS else len(_WRAPPERS) for key in self.path]
        return (len(known), *known)


def _found_in(content: Any, *, averaged: bool) -> Checkpoint:
    mappings = list(_mappings(content))
    detectors = [
        _Candidate(mapping, path, prefix) for path, mapping in mappings for prefix in _detector_prefixes(mapping)
    ]
    chosen = _chosen(detectors, averaged=averaged) if detectors else _of_something_else(content, mappings, averaged)
    weights, left_out = {}, []
    for key, value in chosen.content.items():
        if not isinstance(key, str):
            continue
        name = key[len(chosen.prefix) :] if key.startswith(chosen.prefix) else None
        if name is None or (detectors and name.partition(".")[0] not in _ROOTS):
            left_out.append(key)
        else:
            weights[name] = _weight(key, value)
    return Checkpoint(
        weights=weights,
        found_at=chosen.place,
        left_out=tuple(left_out),
        labels=tuple(_label_lists(mappings)),
        config_text=_config_text(mappings),
    )


def _mappings(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All nested dicts with the keys that lead there, outermost first. A dict referenced twice is listed once."""
    waiting: deque[tuple[tuple[str, ...], Any]] = deque([((), content)] if _holds(content) else [])
    seen: set[int] = set()
    while waiting:
        path, value = waiting.popleft()
        inner = value.items if isinstance(value, Unread) else value
        if id(inner) in seen or len(path) > _DEEPEST:
            continue
        seen.add(id(inner))
        if isinstance(inner, Mapping):
            yield path, inner
        children = inner.items() if isinstance(inner, Mapping) else enumerate(inner)
        waiting += [((*path, str(key)), item) for key, item in children if _holds(item)]


def _holds(value: Any) -> bool:
    """Whether it may contain dicts."""
    return isinstance(value, Mapping | Unread | list)


_DEEPEST = 20
"""Maximum nesting of dicts; nobody wraps weights more often."""


def _detector_prefixes(mapping: Mapping[Any, Any]) -> list[str]:
    """The prefixes of the detectors' names, one per detector in the mapping."""
    prefixes: dict[str, None] = {}
    for key, value in mapping.items():
        if isinstance(key, str) and (match := _DETECTOR.search(key)) and _may_be_a_weight(value):
            prefixes[key[: match.start(1)]] = None
    return list(prefixes)


def _chosen(candidates: Sequence[_Candidate], *, averaged: bool) -> _Candidate:
    wanted = [one for one in candidates if one.is_averaged is averaged]
    if not wanted and averaged:
        raise ModelStoreError(
            "expected averaged weights under a key such as model_ema, ema or state_dict_ema, got none"
        )
    ranked = sorted(wanted or candidates, key=_Candidate.rank)
    ties = [one for one in ranked if one.rank() == ranked[0].rank()]
    if len(ties) > 1:
        places = ", ".join(one.place or "no key" for one in ties)
        raise ModelStoreError(f"expected one detector, got {len(ties)}, under {places}: save one of them alone")
    return ranked[0]


def _of_something_else(
    content: Any, mappings: list[tuple[tuple[str, ...], Mapping[Any, Any]]], averaged: bool
) -> _Candidate:
    """Weights that are not a detector's: a whole mapping that holds weights, without its common prefix."""
    counted = [
        (sum(isinstance(key, str) and _may_be_a_weight(value) for key, value in mapping.items()), path, mapping)
        for path, mapping in mappings
        if not any("optim" in key for key in path)
    ]
    found = [_Candidate(mapping, path, _common_prefix(mapping)) for count, path, mapping in counted if count]
    if not found:
        raise ModelStoreError(_why_no_weights(content))
    if len(found) == 1 and not averaged:
        return found[0]
    return _chosen(found, averaged=averaged)


def _why_no_weights(content: Any) -> str:
    inner = content
    for _ in range(_DEEPEST):
        if isinstance(inner, Mapping) and len(inner) == 1:
            inner = next(iter(inner.values()))
    if isinstance(inner, Unread):
        return f"expected weights by name, got {described(inner)}; save `model.state_dict()` alone"
    if isinstance(inner, Mapping) and inner:
        some = ", ".join(f"{key} ({described(value)})" for key, value in list(inner.items())[:10])
        return f"expected nothing but weights by name, got {some}; save `model.state_dict()` alone"
    return f"expected weights by name, got {type(content).__name__}"


def _common_prefix(mapping: Mapping[Any, Any]) -> str:
    names = [key for key, value in mapping.items() if isinstance(key, str) and _may_be_a_weight(value)]
    # `torch.optim.swa_utils.AveragedModel` stores the number of averaged models.
    shared = os.path.commonprefix([name for name in names if name != "n_averaged"])  # noqa: RUF071  # no paths
    return shared[: shared.rfind(".") + 1]


def _may_be_a_weight(value: Any) -> bool:
    match value:
        case Tensor() | np.ndarray():
            return True
        case Unread(name=name):
            return name.startswith(("torch._utils._rebuild_", "numpy.core.multiarray._re", "numpy.core.numeric._from"))
        case _:
            return False


def _weight(key: str, value: Any) -> Tensor:
    try:
        tensor = tensor_of(value)
        if tensor is not None:
            return tensor
        array = array_of(value)
    except ModelStoreError as error:
        raise ModelStoreError(f"{key}: {error}") from error
    if array is None:
        raise ModelStoreError(f"expected nothing but weights by name, got {key} ({described(value)})")
    numbers = torch.from_numpy(array)
    return numbers.float() if numbers.is_floating_point() else numbers


def _label_lists(mappings: list[tuple[tuple[str, ...], Mapping[Any, Any]]]) -> Iterator[tuple[str, ...]]:
    """Lists of names beside the weights that may be class names."""
    for _, mapping in mappings:
        for key, value in mapping.items():
            if isinstance(key, str) and key.lower() in _LABEL_KEYS:
                names = list(value.values()) if isinstance(value, Mapping) else value
                if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                    yield tuple(names)


def _config_text(mappings: list[tuple[tuple[str, ...], Mapping[Any, Any]]]) -> str:
    texts = [
        mapping[key] for path, mapping in mappings if path == ("meta",) for key in ("config", "cfg") if key in mapping
    ]
    return next((text for text in texts if isinstance(text, str)), "")
