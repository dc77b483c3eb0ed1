"""PNG as this package needs it, without an imaging library: arrays of pixels into files that are sent, and the grey
files that masks come in into arrays.

PNG is ISO/IEC 15948.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels: grey, grey and alpha, RGB, RGB and alpha
_FILTER_NONE, _FILTER_SUB, _FILTER_UP = 0, 1, 2


def encode_png(pixels: npt.NDArray[Any]) -> bytes:
    """Write pixels as a PNG file, losslessly.

    Args:
        pixels: (H, W) or (H, W, C) with 1 to 4 channels in the order RGB and alpha; uint8, or uint16 for 16 bits.

    Raises:
        ValueError: another shape or type.
    """
    shape = (*pixels.shape, 1) if pixels.ndim == 2 else pixels.shape
    if len(shape) != 3 or shape[2] not in _COLOUR_TYPES or 0 in shape:
        raise ValueError(f"expected pixels as (height, width) or (height, width, 1 to 4), got {pixels.shape}")
    if pixels.dtype not in (np.uint8, np.uint16):
        hint = "; from 0 to 1 it is (255 * pixels).round().astype(np.uint8)" if pixels.dtype.kind == "f" else ""
        raise ValueError(f"expected pixels in uint8 or uint16, got {pixels.dtype}{hint}")
    height, width, channels = shape
    depth = 8 * pixels.itemsize
    big_endian = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">"))
    rows = big_endian.view(np.uint8).reshape(height, -1)
    filtered = np.empty((height, rows.shape[1] + 1), np.uint8)
    # The differences of neighbouring rows compress better than the rows, and cost one subtraction.
    filtered[:, 0] = _FILTER_UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    head = struct.pack(">IIBBBBB", width, height, depth, _COLOUR_TYPES[channels], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(filtered.tobytes(), 1)), (b"IEND", b"")]
    return _SIGNATURE + b"".join(map(_chunk, chunks))


def decode_grey_png(file: bytes) -> npt.NDArray[np.uint8]:
    """Read a grey PNG of 1 or 8 bits, without interlacing, whose rows have the filters None, Sub or Up, as the server
    writes masks.

    Returns:
        (H, W) samples, 0 to 1 or 0 to 255.

    Raises:
        ValueError: not such a file.
    """
    chunks = list(_chunks(file))
    if not chunks or chunks[0][0] != b"IHDR":
        raise ValueError("expected a PNG file")
    width, height, depth, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    if depth not in (1, 8) or any(rest):
        raise ValueError(f"expected a grey PNG of 1 or 8 bits without interlacing, got {depth} bits, {rest}")
    data = zlib.decompress(b"".join(data for kind, data in chunks if kind == b"IDAT"))
    rows = np.frombuffer(data, np.uint8).reshape(height, -1).copy()
    filters, samples = rows[:, 0], rows[:, 1:]
    if (filters > _FILTER_UP).any():
        raise ValueError(f"expected rows with the filters None, Sub and Up, got {sorted(set(filters.tolist()))}")
    if (filters == _FILTER_UP).all():
        samples = samples.cumsum(axis=0, dtype=np.uint8)
    else:
        _undo_filters(filters, samples)
    return np.unpackbits(samples, axis=1)[:, :width] if depth == 1 else samples


def _undo_filters(filters: npt.NDArray[np.uint8], samples: npt.NDArray[np.uint8]) -> None:
    for y, kind in enumerate(filters):
        if kind == _FILTER_SUB:
            samples[y] = samples[y].cumsum(dtype=np.uint8)
        elif kind == _FILTER_UP and y:
            samples[y] += samples[y - 1]


def _chunk(chunk: tuple[bytes, bytes]) -> bytes:
    kind, data = chunk
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_SIGNATURE) if file.startswith(_SIGNATURE) else len(file)
    while at + 12 <= len(file):
        [length] = struct.unpack_from(">I", file, at)
        yield file[at + 4 : at + 8], file[at + 8 : at + 8 + length]
        at += 12 + length
