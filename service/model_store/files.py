"""Read the files of an untrusted model folder: only regular files, and only up to sensible sizes. A pipe without a
writer, an endless device or a huge text is an error of that one model. Does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from service.errors import ModelStoreError

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Limit for a `model.toml` or a model card: a hundred thousand labels take 2 MiB."""
# About forty thousand tensors; the largest detectors have two thousand.
_MAX_HEADER_BYTES = 4 * 1024 * 1024
# Convolutions have four; with a million, creating the tensor takes minutes.
_MAX_DIMENSIONS = 16

_KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading. Never blocks on anything else, such as a pipe.

    Raises:
        ModelStoreError: it is missing, cannot be read, or is not a regular file.
    """
    try:
        # O_NONBLOCK: otherwise opening a pipe without a writer would block. It has no effect on regular files.
        with open(path, "rb", opener=lambda name, flags: _open_regular(name, flags | os.O_NONBLOCK)) as file:
            yield file
    except FileNotFoundError:
        raise ModelStoreError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelStoreError(f"{path}: cannot be read: {error.strerror}") from error


def _open_regular(path: str, flags: int) -> int:
    """A descriptor of a regular file."""
    descriptor = os.open(path, flags)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for name, is_kind in _KINDS.items() if is_kind(mode)), "something else")
        raise ModelStoreError(f"{path}: expected a regular file, got {kind}")
    return descriptor


def read_text(path: Path) -> str:
    """A text in UTF-8.

    Raises:
        ModelStoreError: as `open_regular`; or it is larger than `MAX_TEXT_BYTES`, or not UTF-8.
    """
    with open_regular(path) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ModelStoreError(f"{path}: expected at most {MAX_TEXT_BYTES:,} bytes of text, got more")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelStoreError(f"{path}: expected UTF-8 text, got the byte {error.object[error.start]:#04x}") from error


def sha256_of(path: Path) -> str:
    """A file's sha256 in hexadecimal.

    Raises:
        ModelStoreError: as `open_regular`.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_safetensors(path: Path) -> dict[str, tuple[int, ...]]:
    """Check by its header that the file is complete safetensors. Cheap; does not detect changed weights.

    Returns:
        The shape of each tensor.

    Raises:
        ModelStoreError: missing, not safetensors, truncated, or a tensor has more dimensions than in any network.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        header_size = int.from_bytes(start, "little")
        # The first bytes of a pickle or a text are, as a number, far beyond the file's size.
        header = file.read(header_size) if header_size <= min(size, _MAX_HEADER_BYTES) else b""
    try:
        tensors = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        shapes = {key: tuple(int(side) for side in entry["shape"]) for key, entry in tensors.items()}
        expected_size = 8 + header_size + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise ModelStoreError(f"{path}: expected a safetensors file, got {_kind(start)}") from None
    if (most := max(map(len, shapes.values()), default=0)) > _MAX_DIMENSIONS:
        raise ModelStoreError(f"{path}: a tensor of {most} dimensions; expected at most {_MAX_DIMENSIONS}")
    if size != expected_size:
        problem = "truncated" if size < expected_size else "longer than its header says"
        raise ModelStoreError(f"{path}: {problem}: expected {expected_size:,} bytes, got {size:,}")
    return shapes


def _kind(start: bytes) -> str:
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        return "what looks like a PyTorch checkpoint (`roiserve models import` converts it)"
    return "an empty file" if not start else "something else, or only the beginning of one"
