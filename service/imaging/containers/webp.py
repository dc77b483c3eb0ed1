"""WebP: a RIFF file of chunks. The size is needed before the decoder is opened, because opening it allocates two
canvases.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from service.errors import InvalidImageError
from service.imaging.containers.container import Container
from service.imaging.containers.exif import read_orientation

# An animation has one or two chunks per frame.
MAX_CHUNKS = 10_000

_FIRST_CHUNK = 12


def read_webp(data: bytes) -> Container:
    """Read the canvas size from the first chunk, of which there are three kinds, and look for EXIF."""
    return Container(_canvas_size(data), data, _orientation(data))


def _canvas_size(data: bytes) -> tuple[int, int]:
    kind, start = data[_FIRST_CHUNK : _FIRST_CHUNK + 4], _FIRST_CHUNK + 8
    if kind == b"VP8X":  # extended: three bytes each, less one
        width, height = (1 + int.from_bytes(data[start + at : start + at + 3], "little") for at in (4, 7))
    elif kind == b"VP8L":  # lossless: 14 bits each, less one, after a signature byte
        (bits,) = struct.unpack_from("<I", data, start + 1)
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    elif kind == b"VP8 ":  # lossy: 14 bits each, after the frame tag and its start code; the upper two are a scale
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, start + 6))
    else:
        raise InvalidImageError("the WebP data do not begin with a VP8, VP8L or VP8X chunk")
    return height, width


def _orientation(data: bytes) -> int:
    for kind, payload in _chunks(data):
        if kind == b"EXIF":
            return read_orientation(bytes(payload).removeprefix(b"Exif\0\0"))
    return 1


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view = memoryview(data)
    position = _FIRST_CHUNK
    for _ in range(MAX_CHUNKS):
        if position + 8 > len(data):
            return
        kind, length = struct.unpack_from("<4sI", data, position)
        yield kind, view[position + 8 : position + 8 + length]
        position += 8 + length + length % 2
    raise InvalidImageError(f"the WebP data hold over {MAX_CHUNKS} chunks")
