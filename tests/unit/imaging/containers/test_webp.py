"""WebP: the size from each kind of first chunk, without opening the decoder."""

from __future__ import annotations

import io
import struct

import PIL.Image
import pytest

from service.errors import InvalidImageError, TooLargeError
from service.imaging.containers.webp import MAX_CHUNKS, read_webp
from service.imaging.decode import ImageLimits, decode_image


def webp(mode: str = "RGB", **options: object) -> bytes:
    file = io.BytesIO()
    PIL.Image.new(mode, (300, 20), (1,) * len(mode)).save(file, "WebP", **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (b"VP8 ", webp()),
        (b"VP8L", webp(lossless=True)),
        (b"VP8X", webp("RGBA", exif=PIL.Image.Exif(), icc_profile=b"profile")),
    ],
)
def test_size_is_read_from_each_kind_of_first_chunk(kind: bytes, data: bytes) -> None:
    assert data[12:16] == kind
    assert read_webp(data).image_size == (20, 300)


def test_a_canvas_of_gigabytes_is_refused_before_the_decoder_allocates_it() -> None:
    canvas = (16_383).to_bytes(3, "little") * 2
    data = bytearray(webp("RGBA", icc_profile=b"profile"))
    data[24:30] = canvas
    with pytest.raises(TooLargeError, match="16384 x 16384"):
        decode_image(bytes(data), limits=ImageLimits(max_image_pixels=1_000_000))


def test_chunks_are_counted() -> None:
    with pytest.raises(InvalidImageError, match=f"over {MAX_CHUNKS} chunks"):
        read_webp(webp() + struct.pack("<4sI", b"none", 0) * MAX_CHUNKS)


def test_an_unknown_first_chunk_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="VP8, VP8L or VP8X"):
        read_webp(b"RIFF\x10\0\0\0WEBPmore\4\0\0\0....")
