"""TIFF: directories of tags that point anywhere in the file. The first picture is kept by writing a new directory at
the end, with only the tags that its pixels need, and pointing the header at it. So Pillow reads no second directory,
no EXIF, and copies no value of a tag that nobody asked for (65,535 tags may each point at the same megabytes).
"""

from __future__ import annotations

import struct

from service.errors import InvalidImageError, TooLargeError, UnsupportedImageError
from service.imaging.containers.container import Container
from service.imaging.containers.directory import Directory, read_directory
from service.imaging.containers.exif import ORIENTATION_TAG

# One strip a row is legal and common, in each of three planes. Pillow makes an object of every strip.
MAX_STRIPS = 65_536
# A tile may be larger than the picture, and the decoder allocates it whole.
MAX_TILE_PIXELS = 1 << 24

_WIDTH, _HEIGHT, _COMPRESSION = 256, 257, 259
_STRIP_OFFSETS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 273, 322, 323, 324
# Besides: bits per sample, photometric interpretation, fill order, samples per pixel, rows per strip, byte counts,
# planes, CCITT options, predictor, palette, extra samples, sample format, JPEG tables, and how YCbCr is to be read.
_NEEDED_TAGS = frozenset(
    {_WIDTH, _HEIGHT, 258, _COMPRESSION, 262, 266, _STRIP_OFFSETS, 277, 278, 279, 284, 292, 293, 317, 320}
    | {_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, 325, 338, 339, 347, 529, 530, 531, 532}
)
# None, CCITT, LZW, JPEG, deflate, PackBits, Zstandard. Not LZMA, with which a file may ask for gigabytes of memory.
_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000)


def read_tiff(data: bytes) -> Container:
    """Read size and orientation from the first directory, and bound what its tags ask a decoder to do."""
    directory = read_directory(data)
    width, height = _integer(directory, _WIDTH), _integer(directory, _HEIGHT)
    compression = _integer(directory, _COMPRESSION, default=1)
    if compression not in _COMPRESSIONS:
        raise UnsupportedImageError(f"TIFF with compression {compression}; we read {_COMPRESSIONS}")
    if _integer(directory, _TILE_WIDTH, default=1) * _integer(directory, _TILE_HEIGHT, default=1) > MAX_TILE_PIXELS:
        raise TooLargeError(f"a tile of the TIFF is over {MAX_TILE_PIXELS} pixels")
    offsets = [entry for tag, entry in directory.entries.items() if tag in (_STRIP_OFFSETS, _TILE_OFFSETS)]
    if any(entry.count > MAX_STRIPS for entry in offsets):
        raise TooLargeError(f"the TIFF is cut into over {MAX_STRIPS} strips or tiles")
    orientation = _integer(directory, ORIENTATION_TAG, default=1)
    return Container((height, width), _first_picture(directory), orientation if 1 <= orientation <= 8 else 1)


def _integer(directory: Directory, tag: int, *, default: int | None = None) -> int:
    values = directory.integers(tag)
    if values:
        return values[0]
    if default is None:
        raise InvalidImageError(f"the TIFF data lack tag {tag} (256 is the width, 257 the height)")
    return default


def _first_picture(directory: Directory) -> bytes:
    """The file with a new directory of the needed tags at its end."""
    needed = [entry for tag, entry in sorted(directory.entries.items()) if tag in _NEEDED_TAGS]
    if sum(entry.value_bytes for entry in needed) > len(directory.data):
        raise InvalidImageError("the tags of the TIFF are larger than its data")
    data, order = directory.data, directory.byte_order
    padding = bytes(-len(data) % 8)
    count, pointer, header_bytes = ("Q", "Q", 8) if directory.is_big else ("H", "I", 4)
    new_directory = struct.pack(order + count, len(needed)) + b"".join(entry.raw for entry in needed)
    no_next_directory = struct.pack(order + pointer, 0)
    new_pointer = struct.pack(order + pointer, len(data) + len(padding))
    rest = data[header_bytes + len(new_pointer) :]
    return b"".join((data[:header_bytes], new_pointer, rest, padding, new_directory, no_next_directory))
