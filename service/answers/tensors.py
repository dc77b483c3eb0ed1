"""Detections as named arrays, for protocols that write tensors themselves: no mask is spread over its box, nothing is
turned into text. `read_tensors` gives the arrays back, without a copy.

The bytes are a length (4 bytes, little-endian), that many bytes of JSON, `[[name, dtype, shape], ...]`, and then the
arrays' elements in the same order, little-endian, the last index fastest.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from service.answers.encoder import Encoder
from service.structures import Detections, Image, ModelInfo

_LENGTH = struct.Struct("<I")


class TensorsEncoder(Encoder):
    """See the module."""

    def encode(self, image: Image, part: Detections, info: ModelInfo, *, should_stop: Callable[[], bool]) -> bytes:
        """`boxes`, `labels`, `scores`, then `masks` and further outputs if there are any; see `Detections`."""
        arrays = [(name, np.ascontiguousarray(values)) for name, values in part.arrays().items()]
        header = orjson.dumps([[name, values.dtype.str, values.shape] for name, values in arrays])
        return b"".join((_LENGTH.pack(len(header)), header, *(values.tobytes() for _, values in arrays)))


def read_tensors(encoded: bytes) -> Mapping[str, NDArray[Any]]:
    """The arrays by name, each of length D. They cannot be written to."""
    [length] = _LENGTH.unpack_from(encoded)
    offset = _LENGTH.size + length
    arrays = {}
    for name, dtype, shape in orjson.loads(encoded[_LENGTH.size : offset]):
        kind, count = np.dtype(dtype), math.prod(shape)
        arrays[name] = np.frombuffer(encoded, kind, count, offset).reshape(shape)
        offset += count * kind.itemsize
    return arrays
