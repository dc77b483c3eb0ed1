"""The formats we read, recognised by their first bytes. The client's file name and `Content-Type` are ignored."""

from __future__ import annotations

from typing import Literal

from service.errors import InvalidImageError, UnsupportedImageError

ImageFormat = Literal["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"]

_SIGNATURES: tuple[tuple[bytes, ImageFormat], ...] = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),  # BigTIFF
    (b"MM\0+", "TIFF"),
)
_READABLE = "we read JPEG, PNG, WebP, GIF, BMP and TIFF"


def sniff_format(data: bytes) -> ImageFormat:
    """Recognise the format by the first bytes.

    Raises:
        InvalidImageError: there are no bytes.
        UnsupportedImageError: none of the formats that we read; the message lists them.
    """
    if not data:
        raise InvalidImageError(f"the image is empty (0 bytes); {_READABLE}")
    for signature, image_format in _SIGNATURES:
        if data.startswith(signature):
            return image_format
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    raise UnsupportedImageError(f"{_describe(data)}; {_READABLE}")


def _describe(data: bytes) -> str:
    """Describe the files that are most often sent by mistake."""
    if data[4:8] == b"ftyp":
        return "the bytes look like HEIC, AVIF or a video"
    if data.startswith(b"%PDF"):
        return "the bytes are a PDF document"
    head = data[:256]
    if all(byte >= 0x20 or byte in b"\t\n\r\f" for byte in head):
        return "the bytes look like text, not like an image"
    return "the bytes are not an image in a known format"
