"""Which format the bytes are, told by their first bytes alone."""

from __future__ import annotations

import io

import PIL.Image
import pytest
from PIL import features

from service.errors import InvalidImageError, UnsupportedImageError
from service.imaging.formats import sniff_format


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"])
def test_every_format_that_we_read_is_recognised(image_format: str) -> None:
    file = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(file, image_format)
    assert sniff_format(file.getvalue()) == image_format


@pytest.mark.parametrize("header", [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"])
def test_tiff_is_recognised_in_both_byte_orders_and_as_bigtiff(header: bytes) -> None:
    assert sniff_format(header + bytes(12)) == "TIFF"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<html><body>404</body></html>", "text"),
        (b"aGVsbG8gd29ybGQ=", "text"),
        ("žluťoučký kůň".encode(), "text"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b"\0\1\2\3", "not an image"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "not an image"),
    ],
)
def test_anything_else_is_unsupported_and_the_message_says_what_it_is_and_what_we_read(data: bytes, what: str) -> None:
    with pytest.raises(UnsupportedImageError, match=f"{what}.*; we read JPEG, PNG, WebP, GIF, BMP and TIFF"):
        sniff_format(data)


def test_no_bytes_at_all_is_an_invalid_image() -> None:
    with pytest.raises(InvalidImageError, match=r"empty \(0 bytes\)"):
        sniff_format(b"")


def test_pillow_here_can_decode_webp() -> None:
    """Pillow may be built without it, and then every WebP would be called broken."""
    assert features.check("webp")
