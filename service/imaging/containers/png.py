"""PNG: a row of chunks, each with a length, a type and a CRC.

Texts and profiles (compressed, so they may be bombs), animation and everything else that the picture does not need are
left out. The image data is joined into one chunk, because Pillow is slow with a million tiny ones. Pillow does not
check the CRC of image data; this reader does.
"""

from __future__ import annotations

import struct
import zlib

from service.errors import InvalidImageError
from service.imaging.containers.container import Container
from service.imaging.containers.exif import read_orientation

# libpng writes 8 KiB per chunk, so this is enough for 800 MB.
MAX_CHUNKS = 100_000

MAX_EXPANSION = 2
_FREE_BYTES = 1 << 20

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHECKED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT")


def read_png(data: bytes) -> Container:
    """Read the header chunk and EXIF, check the CRCs, and keep only header, palette, transparency and image data."""
    header = palette = transparency = b""
    image_data: list[bytes] = []
    orientation = 1
    has_exif = False
    position = len(_SIGNATURE)
    for _ in range(MAX_CHUNKS):
        if position == len(data):
            break  # no end chunk; the decoder will notice if pixels are missing
        length, kind = struct.unpack_from(">I4s", data, position)
        start, end = position + 8, position + 8 + length
        if end + 4 > len(data):
            raise InvalidImageError("the PNG data end within a chunk")
        if not header and (kind != b"IHDR" or length != 13):
            raise InvalidImageError("the PNG data do not begin with an IHDR chunk of 13 bytes")
        if kind in _CHECKED and zlib.crc32(data[position + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise InvalidImageError(f"wrong CRC in the {kind.decode()} chunk of the PNG data")
        if kind == b"IEND":
            break
        if kind == b"IHDR":
            header = data[start:end]
        elif kind == b"PLTE":
            palette = data[start:end]
        elif kind == b"tRNS":
            transparency = data[start:end]
        elif kind == b"IDAT":
            image_data.append(data[start:end])
        elif kind == b"eXIf" and not has_exif:
            has_exif = True
            orientation = read_orientation(data[start:end])
        position = end + 4
    else:
        raise InvalidImageError(f"the PNG data hold over {MAX_CHUNKS} chunks")
    if not image_data:
        raise InvalidImageError("the PNG data hold no image data")
    width, height = struct.unpack_from(">II", header)
    _check_length(sum(map(len, image_data)), header)
    chunks = [_chunk(b"IHDR", header)]
    chunks += [_chunk(b"PLTE", palette)] if palette else []
    chunks += [_chunk(b"tRNS", transparency)] if transparency else []
    chunks += [_chunk(b"IDAT", b"".join(image_data)), _chunk(b"IEND", b"")]
    return Container((height, width), _SIGNATURE + b"".join(chunks), orientation)


def _check_length(coded_bytes: int, header: bytes) -> None:
    """Reject image data so long that it must contain empty blocks: deflate hardly expands even noise."""
    width, height, depth, colour = struct.unpack_from(">IIBB", header)
    row_bytes = width * depth * _SAMPLES.get(colour, 4) // 8 + 2
    decoded_bytes = 2 * height * row_bytes  # interlaced ones have more rows and filter bytes
    if coded_bytes > MAX_EXPANSION * decoded_bytes + _FREE_BYTES:
        raise InvalidImageError(f"the PNG holds {coded_bytes} coded bytes for {height * row_bytes} bytes of pixels")


def _chunk(kind: bytes, payload: bytes) -> bytes:
    body = kind + payload
    return struct.pack(">I", len(payload)) + body + struct.pack(">I", zlib.crc32(body))
