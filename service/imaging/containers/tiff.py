"""TIFF: directories of tags that point anywhere in the file. The first picture is kept by writing a new directory at
the end, with only the tags that its pixels need, and pointing the header at it. Pillow then reads no second directory
and no EXIF, and copies no values of unneeded tags (65,535 tags may each point at the same megabytes).

A decoder's work is limited before it starts: strips and tiles may extend only slightly beyond the picture, no byte of
the file may be decoded twice, and a JPEG in a strip has the same limits as a JPEG file.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from service.errors import InvalidImageError, TooLargeError, UnsupportedImageError
from service.imaging.containers.container import Container
from service.imaging.containers.directory import Directory, read_directory
from service.imaging.containers.exif import read_orientation
from service.imaging.containers.jpeg import check_scans, count_work

# One strip per row is legal and common, in each of three planes. Pillow creates an object for every strip.
MAX_STRIPS = 65_536
# Each needs its own decoder, which takes tens of microseconds to set up. Writers make strips of at least 8 rows.
MAX_JPEG_STRIPS = 8_192
# A tile may be larger than the picture, and the decoder allocates it whole.
MAX_TILE_PIXELS = 1 << 24
# LZW expands noise by 1.5, and fax coding expands a chequered picture by 4.5. More can only be codes that produce no
# pixels.
MAX_EXPANSION = 6
_FREE_BYTES = 1 << 20
_MAX_JPEG_TABLES_BYTES = 1 << 16
# libjpeg takes 0.3 µs per fill byte. Unlike in a JPEG file they can't be removed, because the directory holds the
# lengths.
MAX_FILL_BYTES = 1 << 16
# Of all JPEGs together: a dozen in each of so many strips.
MAX_JPEG_SEGMENTS = 1 << 17
# Of every tag but the lists of strips or tiles. A palette of 16 bits has 384 KiB.
_MAX_TAG_BYTES = 1 << 19

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS, _PLANES = 256, 257, 258, 259, 277, 278, 284
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 322, 323, 324, 325
_JPEG_TABLES = 347
# Tags with a single value. A decoder would read as many as the count says, and warn.
_SINGLE_TAGS = frozenset(
    {_WIDTH, _HEIGHT, _COMPRESSION, 262, 266, _SAMPLES, _ROWS, _PLANES, 292, 293, 317, _TILE_WIDTH, _TILE_HEIGHT, 531}
)
# Besides: bits per sample, palette, extra samples, sample format, JPEG tables, and the interpretation of YCbCr.
_NEEDED_TAGS = _SINGLE_TAGS | {
    *(_BITS, _STRIP_OFFSETS, _STRIP_BYTES, 320, _TILE_OFFSETS, _TILE_BYTES, 338, 339, _JPEG_TABLES, 529, 530, 532),
}
_LISTS = frozenset({_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES})  # no longer than `MAX_STRIPS`
_JPEG = 7
# None, CCITT, LZW, JPEG, deflate, PackBits, Zstandard. Not LZMA, because a file can make it allocate gigabytes.
_COMPRESSIONS = (1, 2, 3, 4, 5, _JPEG, 8, 32773, 32946, 50000)
# Pillow reads nothing beyond these, and libtiff would allocate whatever the file asks for.
_MAX_SAMPLES, _MAX_BITS = 8, 64
_SEPARATE_PLANES = 2


def read_tiff(data: bytes) -> Container:
    """Read size and orientation from the first directory, and limit the work that its tags cause a decoder."""
    directory = read_directory(data)
    image_size = _required(directory, _HEIGHT), _required(directory, _WIDTH)
    compression = _integer(directory, _COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        raise UnsupportedImageError(f"TIFF with compression {compression}; we read {_COMPRESSIONS}")
    layout = _layout(directory, image_size)
    num_passes = _check_work(directory, layout, image_size, compression)
    orientation = read_orientation(data)
    return Container(image_size, _first_picture(directory), orientation, num_passes=num_passes)


def _required(directory: Directory, tag: int) -> int:
    value = directory.integer(tag)
    if value is None:
        raise InvalidImageError(f"the TIFF data lack tag {tag} (256 is the width, 257 the height)")
    return value


def _integer(directory: Directory, tag: int, default: int) -> int:
    """The value of a tag, or the default if the tag is missing. A tag of another type is an error, since a decoder may
    still understand it.
    """
    value = directory.integer(tag)
    if value is None and tag in directory.entries:
        raise InvalidImageError(f"TIFF tag {tag} holds no integer")
    return default if value is None else value


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a picture is divided into strips or tiles.

    Attributes:
        segment_pixels: width times height of each.
        count: how many a decoder may visit, in all planes.
        offsets, byte_counts: the tags that say where they are.
        pixel_bits: bits of all samples of a pixel in one segment.
    """

    segment_pixels: int
    count: int
    planes: int
    offsets: int
    byte_counts: int
    pixel_bits: int


def _layout(directory: Directory, image_size: tuple[int, int]) -> _Layout:
    """Read the layout.

    Raises:
        TooLargeError: too many strips or tiles, or some extend far beyond the picture.
    """
    height, width = image_size
    samples, bits = _integer(directory, _SAMPLES, 1), _integer(directory, _BITS, 1)
    if samples > _MAX_SAMPLES or bits > _MAX_BITS:
        raise UnsupportedImageError(
            f"TIFF with {samples} samples a pixel of {bits} bits; we read up to {_MAX_SAMPLES} of {_MAX_BITS}"
        )
    is_tiled = _TILE_WIDTH in directory.entries or _TILE_OFFSETS in directory.entries
    if is_tiled:
        tile_width, tile_height = _integer(directory, _TILE_WIDTH, 0), _integer(directory, _TILE_HEIGHT, 0)
    else:
        tile_width, tile_height = width, min(_integer(directory, _ROWS, height), height)
    if min(height, width, tile_width, tile_height) <= 0:
        raise InvalidImageError(f"the TIFF is {width} x {height} pixels in parts of {tile_width} x {tile_height}")
    if is_tiled and tile_width * tile_height > MAX_TILE_PIXELS:
        raise TooLargeError(f"a tile of the TIFF is over {MAX_TILE_PIXELS} pixels")
    planes = samples if _integer(directory, _PLANES, 1) == _SEPARATE_PLANES else 1
    offsets, byte_counts = (_TILE_OFFSETS, _TILE_BYTES) if is_tiled else (_STRIP_OFFSETS, _STRIP_BYTES)
    # libtiff goes by the picture's size; for uncompressed data, Pillow goes by the number of offsets.
    needed = planes * -(-height // tile_height) * -(-width // tile_width)
    listed = directory.entries[offsets].count if offsets in directory.entries else 0
    count = max(needed, listed)
    if count > MAX_STRIPS:
        raise TooLargeError(f"the TIFF is cut into over {MAX_STRIPS} strips or tiles")
    if count * tile_width * tile_height > planes * (2 * height * width + MAX_TILE_PIXELS):
        raise TooLargeError(
            f"{count} strips or tiles of {tile_width} x {tile_height} pixels reach far beyond the {width} x {height} "
            "pixels of the TIFF"
        )
    pixel_bits = bits * (1 if planes > 1 else samples)
    return _Layout(tile_width * tile_height, count, planes, offsets, byte_counts, pixel_bits)


def _check_work(directory: Directory, layout: _Layout, image_size: tuple[int, int], compression: int) -> int:
    """Limit the cost of the strips or tiles. Returns how many times a decoder visits all pixels, rounded up.

    Raises:
        InvalidImageError: they have no offsets, overlap, or hold more data than their pixels can need.
        TooLargeError: the JPEGs in them are too costly.
    """
    for tag in (layout.offsets, layout.byte_counts):
        if tag in directory.entries and directory.entries[tag].count > MAX_STRIPS:
            raise TooLargeError(f"the TIFF is cut into over {MAX_STRIPS} strips or tiles")
    offsets, byte_counts = directory.integers(layout.offsets), directory.integers(layout.byte_counts)
    if not offsets:
        raise InvalidImageError("the TIFF does not say where its strips or tiles are")
    if not byte_counts and layout.count > 1:
        # libtiff would use the rest of the file for each.
        raise InvalidImageError(f"the TIFF has {layout.count} strips or tiles and does not say how long they are")
    num_bytes = sum(byte_counts)
    # Ignoring one: some writers give the last, shorter strip the length of the others.
    if layout.count > 1 and num_bytes - max(byte_counts, default=0) > len(directory.data):
        raise InvalidImageError(
            f"the strips or tiles of the TIFF overlap: {num_bytes} bytes in {len(directory.data)} bytes of data"
        )
    if not byte_counts:
        num_bytes = len(directory.data)
    decoded_bytes = layout.count * layout.segment_pixels * layout.pixel_bits // 8
    num_bytes = min(num_bytes, len(directory.data))
    if compression != 1 and num_bytes > MAX_EXPANSION * decoded_bytes + _FREE_BYTES:
        raise InvalidImageError(f"the TIFF holds {num_bytes} coded bytes for {decoded_bytes} bytes of pixels")
    if compression != _JPEG:
        return 1
    return _check_jpegs(directory, layout, image_size, offsets, byte_counts)


def _check_jpegs(
    directory: Directory,
    layout: _Layout,
    image_size: tuple[int, int],
    offsets: tuple[int, ...],
    byte_counts: tuple[int, ...],
) -> int:
    if layout.count > MAX_JPEG_STRIPS:
        raise TooLargeError(f"the TIFF is cut into over {MAX_JPEG_STRIPS} strips or tiles of JPEG")
    tables = directory.entries.get(_JPEG_TABLES)
    view = memoryview(directory.data)
    num_fill = work = most_scans = most_components = num_segments = 0
    if tables is not None:
        if tables.value_bytes > _MAX_JPEG_TABLES_BYTES:
            raise InvalidImageError(f"JPEG tables of {tables.value_bytes} bytes in the TIFF")
        num_fill += count_work(bytes(view[tables.value_offset : tables.value_offset + tables.value_bytes])).fill_bytes
    for index, offset in enumerate(offsets):
        # libtiff looks for the length of a single strip or tile itself, but reads none of several without a length.
        length = byte_counts[index] if index < len(byte_counts) else 0
        part = count_work(bytes(view[offset : len(view) if layout.count == 1 else offset + length]))
        num_segments += part.num_segments
        if num_segments > MAX_JPEG_SEGMENTS:
            raise InvalidImageError(f"the JPEG data in the TIFF hold over {MAX_JPEG_SEGMENTS} segments")
        num_fill += part.fill_bytes
        most_scans = max(most_scans, part.num_scans)
        most_components = max(most_components, part.num_components)
        work += part.num_scans * max(part.num_pixels, layout.segment_pixels)
    if num_fill > MAX_FILL_BYTES:
        raise InvalidImageError(f"the JPEG data in the TIFF hold over {MAX_FILL_BYTES} fill bytes")
    pixels = layout.planes * (image_size[0] * image_size[1])
    num_passes = max(most_scans, -(-(work - layout.planes * MAX_TILE_PIXELS) // pixels), 1)
    check_scans(num_passes, pixels, most_components)
    return num_passes


def _first_picture(directory: Directory) -> bytes:
    """The file with a new directory at its end that has only the needed tags."""
    needed = [(tag, entry) for tag, entry in sorted(directory.entries.items()) if tag in _NEEDED_TAGS]
    if sum(entry.value_bytes for tag, entry in needed if tag not in _SINGLE_TAGS) > len(directory.data):
        raise InvalidImageError("the tags of the TIFF are larger than its data")
    for tag, entry in needed:
        if entry.value_bytes > _MAX_TAG_BYTES and tag not in _SINGLE_TAGS | _LISTS:
            raise InvalidImageError(f"TIFF tag {tag} has {entry.value_bytes} bytes; we read up to {_MAX_TAG_BYTES}")
    data, order = directory.data, directory.byte_order
    padding = bytes(-len(data) % 8)
    count, pointer, header_bytes = ("Q", "Q", 8) if directory.is_big else ("H", "I", 4)
    new_directory = struct.pack(order + count, len(needed))
    for tag, entry in needed:
        value = directory.integer(tag) if tag in _SINGLE_TAGS and entry.count > 1 else None
        new_directory += entry.raw if value is None else directory.entry_of(tag, value)
    no_next_directory = struct.pack(order + pointer, 0)
    new_pointer = struct.pack(order + pointer, len(data) + len(padding))
    rest = data[header_bytes + len(new_pointer) :]
    return b"".join((data[:header_bytes], new_pointer, rest, padding, new_directory, no_next_directory))
