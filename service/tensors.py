"""Named arrays as bytes and back, without a copy on the way back.

The bytes are a length (4 bytes, little-endian), that many bytes of JSON, `[[name, dtype, shape], ...]`, and then the
arrays' elements in the same order, little-endian, the last index fastest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

_LENGTH = struct.Struct("<I")


def write_tensors(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The bytes of the arrays, in order."""
    contiguous = [(name, np.ascontiguousarray(values)) for name, values in arrays.items()]
    header = orjson.dumps([[name, values.dtype.str, values.shape] for name, values in contiguous])
    return b"".join((_LENGTH.pack(len(header)), header, *(values.tobytes() for _, values in contiguous)))


def read_tensors(encoded: bytes) -> Mapping[str, NDArray[Any]]:
    """The arrays by name. They cannot be written to."""
    [length] = _LENGTH.unpack_from(encoded)
    offset = _LENGTH.size + length
    arrays = {}
    for name, dtype, shape in orjson.loads(encoded[_LENGTH.size : offset]):
        kind, count = np.dtype(dtype), math.prod(shape)
        arrays[name] = np.frombuffer(encoded, kind, count, offset).reshape(shape)
        offset += count * kind.itemsize
    return arrays
