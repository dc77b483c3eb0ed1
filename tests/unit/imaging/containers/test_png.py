"""PNG chunks: CRCs, and what is left out."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest

from service.errors import InvalidImageError
from service.imaging.containers.png import MAX_CHUNKS, read_png
from service.imaging.decode import ImageLimits, decode_image
from service.structures import UInt8Array

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))


# Two rows of two grey pixels, each row after a filter byte.
HEADER = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0))
IMAGE_DATA = zlib.compress(b"\0\x0a\x14\0\x1e\x28")
IDAT, IEND = chunk(b"IDAT", IMAGE_DATA), chunk(b"IEND")


def grey(data: bytes) -> list[list[int]]:
    pixels: UInt8Array = decode_image(data, limits=ImageLimits(max_image_pixels=1000)).pixels
    levels: list[list[int]] = pixels[..., 0].tolist()
    return levels


def test_only_what_the_pixels_need_is_kept() -> None:
    extra = chunk(b"tEXt", b"Comment\0" + b"a" * 1000) + chunk(b"iCCP", b"x\0\0") + chunk(b"acTL", bytes(8))
    container = read_png(SIGNATURE + HEADER + extra + IDAT + extra + IEND)
    assert container.pixel_data == SIGNATURE + HEADER + IDAT + IEND
    assert container.image_size == (2, 2)


def test_image_data_in_pieces_are_joined() -> None:
    pieces = b"".join(chunk(b"IDAT", IMAGE_DATA[i : i + 1]) + chunk(b"IDAT") for i in range(len(IMAGE_DATA)))
    assert grey(SIGNATURE + HEADER + pieces + IEND) == [[10, 20], [30, 40]]


@pytest.mark.parametrize("kind", [b"IHDR", b"IDAT", b"tRNS"])
def test_a_wrong_crc_is_refused_and_the_chunk_named(kind: bytes) -> None:
    data = bytearray(SIGNATURE + HEADER + chunk(b"tRNS", b"\0\x0a") + IDAT + IEND)
    crc = data.index(kind) + 4 + struct.unpack_from(">I", data, data.index(kind) - 4)[0]
    data[crc] ^= 1
    with pytest.raises(InvalidImageError, match=f"wrong CRC in the {kind.decode()} chunk"):
        read_png(bytes(data))


def test_a_wrong_crc_in_a_text_harms_nobody() -> None:
    assert grey(SIGNATURE + HEADER + chunk(b"tEXt", b"a\0b")[:-1] + b"!" + IDAT + IEND) == [[10, 20], [30, 40]]


def test_transparency_of_one_grey_level_is_kept() -> None:
    assert grey(SIGNATURE + HEADER + chunk(b"tRNS", b"\0\x1e") + IDAT + IEND) == [[10, 20], [255, 40]]


@pytest.mark.timeout(10)
def test_a_text_that_unpacks_to_gigabytes_is_never_unpacked() -> None:
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))
    assert grey(SIGNATURE + HEADER + bomb * 100 + IDAT + IEND) == [[10, 20], [30, 40]]


def test_chunks_are_counted() -> None:
    with pytest.raises(InvalidImageError, match=f"over {MAX_CHUNKS} chunks"):
        read_png(SIGNATURE + HEADER + chunk(b"IDAT") * MAX_CHUNKS + IDAT + IEND)


def test_a_chunk_that_claims_gigabytes_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="end within a chunk"):
        read_png(SIGNATURE + HEADER + struct.pack(">I", 0xFFFFFFFF) + b"IDAT" + bytes(100))


def test_the_header_chunk_comes_first() -> None:
    with pytest.raises(InvalidImageError, match="do not begin with an IHDR"):
        read_png(SIGNATURE + IDAT + HEADER + IEND)


def test_a_png_without_image_data_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="no image data"):
        read_png(SIGNATURE + HEADER + IEND)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_survives_the_rewriting(mode: str) -> None:
    file = io.BytesIO()
    picture = PIL.Image.linear_gradient("L").convert(mode)
    picture.save(file, "PNG")
    rewritten = PIL.Image.open(io.BytesIO(read_png(file.getvalue()).pixel_data))
    assert rewritten.mode == mode
    assert np.array_equal(np.asarray(rewritten), np.asarray(picture))


def test_image_data_that_can_only_be_empty_blocks_are_refused() -> None:
    empty = b"\0\0\0\xff\xff" * 400_000
    with pytest.raises(InvalidImageError, match="2000014 coded bytes for 8 bytes"):
        read_png(SIGNATURE + HEADER + chunk(b"IDAT", IMAGE_DATA[:2] + empty + IMAGE_DATA[2:]) + IEND)


def test_an_orientation_with_millions_of_values_is_one_value() -> None:
    values = struct.pack("<H", 6) * 1_000_000
    exif = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1_000_000, 26, 0) + values
    assert read_png(SIGNATURE + HEADER + chunk(b"eXIf", exif) * 3 + IDAT + IEND).orientation == 6
