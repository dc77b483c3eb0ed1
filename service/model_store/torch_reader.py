"""Reads files written by `torch.save` (zip archives and the older format) without running code: `pickle_reader.py`
interprets the pickle inside, and tensors are built from the bytes it refers to. Tensors are created only on request, so
an optimizer's state beside the weights costs nothing.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.pickle_reader import Global, Unread, read_pickle

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_MAX_ELEMENTS = 1 << 28
"""Limit for one tensor: a billion bytes in float32. A view may claim more elements than its storage has."""
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Files in the format that preceded zip archives begin with this pickled number."""


@dataclass(frozen=True, eq=False)
class _Storage:
    """A block of numbers of one type in the file, possibly shared by several tensors.

    Attributes:
        read: returns its bytes.
        length: how many numbers it claims to have.
    """

    dtype: torch.dtype
    read: Callable[[], bytes]
    length: int

    @cached_property
    def flat(self) -> Tensor:
        """The numbers, floating-point ones as float32."""
        data = self.read()
        if len(data) < self.length * self.dtype.itemsize:
            raise ModelStoreError("damaged: the data of a tensor end early")
        if not self.length:
            return torch.empty(0)
        numbers = torch.frombuffer(bytearray(data), dtype=self.dtype, count=self.length)
        return numbers.float() if self.dtype.is_floating_point else numbers


def read_torch_zip(path: Path) -> Any:
    """The content of a zip archive of `torch.save`; see `tensor_of`.

    Raises:
        ModelStoreError: damaged, another kind of archive, or compressed, which torch never does.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("data.pkl")), None)
        _check_kind(list(entries), root)
        _check_entries(path, list(entries.values()))
        if f"{root}byteorder" in entries and _stored_bytes(path, entries[f"{root}byteorder"]) != b"little":
            raise ModelStoreError("expected tensors with the lowest byte first, got them from a big-endian machine")
        storages: dict[str, _Storage | Unread] = {}

        def storage(id_: Any) -> _Storage | Unread:
            match id_:
                case ("storage", Global(name=type_), str(key), _, int(length)):
                    if key not in storages:
                        storages[key] = _storage(
                            type_, partial(_stored_bytes, path, entries[f"{root}data/{key}"]), length
                        )
                    return storages[key]
            raise ModelStoreError("expected a checkpoint of tensors, got one that points to something else")

        return read_pickle(_stored_bytes(path, entries[f"{root}data.pkl"]), persistent=storage)
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError, KeyError) as error:
        raise ModelStoreError(f"damaged, or no checkpoint: {error}") from error


def _check_entries(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Reject entries that would be larger in memory than on disk: compressed ones, and ones that share their bytes."""
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ModelStoreError(
                "expected a checkpoint as torch.save writes it, got a zip archive with compressed files "
                f"({entry.filename!r:.80})"
            )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ModelStoreError("damaged: the archive's files are larger than itself")


def _stored_bytes(path: Path, entry: zipfile.ZipInfo) -> bytes:
    """An uncompressed entry. torch may omit the checksums, which `zipfile` requires."""
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, io.SEEK_CUR)
        return file.read(entry.file_size)


def _check_kind(names: list[str], root: str | None) -> None:
    """Raise an error that names the kind of archive, if it is not a checkpoint."""
    way_out = "; save `model.state_dict()` alone"
    if root is None and any(name.endswith("model.weights.h5") for name in names):
        raise ModelStoreError("expected a checkpoint of tensors, got a Keras model: only PyTorch's weights are read")
    if root is None and any(name.endswith(".npy") for name in names):
        raise ModelStoreError("expected a checkpoint of tensors, got NumPy's .npz: only PyTorch's weights are read")
    if any("serialized_exported_program" in name or name.endswith("models/model.json") for name in names):
        raise ModelStoreError(f"expected a checkpoint of tensors, got a program of torch.export{way_out}")
    if root is not None and (f"{root}constants.pkl" in names or any(n.startswith(f"{root}code/") for n in names)):
        raise ModelStoreError(f"expected a checkpoint of tensors, got a TorchScript program{way_out}")
    if root is None:
        raise ModelStoreError("expected a checkpoint as torch.save writes it, got a zip archive without data.pkl")


def read_torch_legacy(file: IO[bytes]) -> Any:
    """The content of a `torch.save` file from before PyTorch 1.6, or in that older format; see `tensor_of`.

    Raises:
        ModelStoreError: damaged.
    """
    storages: dict[str, _Storage | Unread] = {}
    data: dict[str, bytes] = {}

    def storage(id_: Any) -> _Storage | Unread:
        match id_:
            case ("storage", Global(name=type_), str(key), _, int(length), *_):
                if key not in storages:
                    storages[key] = _storage(type_, lambda: data[key], length)
                return storages[key]
            case ("module", *_):
                return Unread("torch.nn.Module", ())
        raise ModelStoreError("expected a checkpoint of tensors, got one that points to something else")

    for _ in range(3):  # magic number, format version, the machine's type sizes
        read_pickle(file)
    content = read_pickle(file, persistent=storage)
    for key in read_pickle(file):
        stored, header = storages.get(key), file.read(8)
        if len(header) < 8 or not isinstance(stored, _Storage):
            raise ModelStoreError("damaged: the data of a tensor end early, or are of an unknown type")
        data[key] = file.read(max(0, *struct.unpack("<q", header)) * stored.dtype.itemsize)
    return content


def _storage(type_: str, read: Callable[[], bytes], length: int) -> _Storage | Unread:
    dtype = _dtype_of(type_)
    return Unread(type_, ()) if dtype is None or length < 0 else _Storage(dtype, read, length)


def _dtype_of(type_: str) -> torch.dtype | None:
    module, _, name = type_.rpartition(".")
    return _DTYPES.get(name) if module in ("torch", "torch.cuda") else None


def tensor_of(value: Any) -> Tensor | None:
    """The tensor that torch wrote as this value, in float32 if floating-point; None if it is not a tensor.

    Raises:
        ModelStoreError: its data is damaged, or it claims more elements than any weight has.
    """
    match value:
        case Tensor():
            return value.float() if value.is_floating_point() else value
        case Unread(
            name="torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
            arguments=(stored, int(offset), tuple(size), tuple(stride), *_),
        ):
            if isinstance(stored, Unread) and stored.name == "torch.storage._load_from_bytes":
                stored = read_torch_legacy(io.BytesIO(stored.arguments[0]))
            return _view(stored, offset, size, stride) if isinstance(stored, _Storage) else None
        case Unread(
            name="torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state",
            arguments=(Unread() as data, *_),
        ) if data.name.startswith("torch._utils._rebuild_tensor"):
            return tensor_of(data)
        case _:
            return None


def _view(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    try:
        if math.prod(size) > _MAX_ELEMENTS:
            raise ModelStoreError(f"a tensor claims {math.prod(size):.3g} elements")
        # Convert the numbers before creating the view, because the view may repeat them.
        return storage.flat.as_strided(size, stride, offset)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ModelStoreError("damaged: a tensor reaches beyond its data") from error
