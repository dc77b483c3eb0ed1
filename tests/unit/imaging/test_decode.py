"""Bytes to upright RGB: good pictures of all kinds, limits, and files that want to do harm."""

from __future__ import annotations

import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import (
    CancelledRequestError,
    InvalidImageError,
    OutOfMemoryError,
    TooLargeError,
    UnsupportedImageError,
)
from service.imaging import decode, pixels
from service.imaging.decode import ImageLimits, decode_image
from service.imaging.pixels import rgb_pixels
from service.structures import UInt8Array

HOSTILE = Path(__file__).parents[4] / "shared" / "hostile"
LIMITS = ImageLimits(max_image_pixels=50_000_000)
FORMATS = ["JPEG", "PNG", "WebP", "GIF", "BMP", "TIFF"]


def encoded(picture: PIL.Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, image_format, **options)
    return file.getvalue()


def gradient(width: int = 48, height: int = 32) -> PIL.Image.Image:
    """A picture with no symmetry: red grows to the right, green downwards, so every turn shows."""
    y, x = np.mgrid[:height, :width]
    return PIL.Image.fromarray(np.dstack([x * 5, y * 7, np.full_like(x, 30)]).astype(np.uint8))


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    idat = b"IDAT" + zlib.compress(bytes(1000))
    chunks = [struct.pack(">I", len(b) - 4) + b + struct.pack(">I", zlib.crc32(b)) for b in (body, idat, b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("image_format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("WebP", {"lossless": True}),
        *(("TIFF", {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
        ("TIFF", {"big_tiff": True}),
    ],
)
def test_lossless_formats_give_back_the_pixels(image_format: str, options: dict[str, object]) -> None:
    image = decode_image(encoded(gradient(), image_format, **options), limits=LIMITS)
    assert image.size == (32, 48)
    assert not image.orientation_applied
    assert np.array_equal(image.pixels, np.asarray(gradient()))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_blocks": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_gives_the_pixels_of_pillow(mode: str, options: dict[str, object]) -> None:
    data = encoded(gradient().convert(mode), "JPEG", **options)
    reference = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode_image(data, limits=LIMITS).pixels, reference)


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(3, 2), (17, 31), (320, 239)])
def test_jpeg_gives_the_pixels_of_pillow_for_odd_sizes_and_all_colour_resolutions(
    size: tuple[int, int], progressive: bool, subsampling: str
) -> None:
    """Both are libjpeg-turbo, with its exact cosine transform and its smooth upsampling: not one bit differs."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{subsampling}")
    options = [cv2.IMWRITE_JPEG_PROGRESSIVE, int(progressive), cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    data = cv2.imencode(".jpg", pixels, options)[1].tobytes()
    reference = np.asarray(PIL.Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data, limits=LIMITS).pixels, reference)


def test_a_jpeg_out_of_order_is_read_where_no_pixels_are_missing() -> None:
    """libjpeg-turbo by itself would refuse bytes too many before a restart marker; many cameras leave some."""
    data = encoded(gradient(64, 64), "JPEG", restart_marker_blocks=1)
    marker = data.index(b"\xff\xd0")
    odd = data[:marker] + bytes(9) + data[marker:]
    with pytest.raises(ValueError, match="extraneous bytes"):
        simplejpeg.decode_jpeg(odd)
    assert np.array_equal(decode_image(odd, limits=LIMITS).pixels, decode_image(data, limits=LIMITS).pixels)


@pytest.mark.parametrize("image_format", ["GIF", "WebP"])
def test_an_animation_gives_its_first_frame(image_format: str) -> None:
    frames = [PIL.Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], lossless=True)
    pixels = decode_image(data, limits=LIMITS).pixels
    assert np.array_equal(pixels, np.broadcast_to([255, 0, 0], (8, 8, 3)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_can_be_written_to_and_lie_in_order(image_format: str, orientation: int) -> None:
    """torch wraps them without a copy, and warns about arrays that cannot be written to."""
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(gradient(), image_format, exif=exif), limits=LIMITS).pixels
    assert pixels.flags.writeable
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WebP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(image_format: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(gradient(), image_format, exif=exif)
    image = decode_image(data, limits=LIMITS)
    with PIL.Image.open(io.BytesIO(data)) as picture:
        upright = PIL.ImageOps.exif_transpose(picture)
    assert image.orientation_applied == (orientation != 1)
    assert image.size == ((32, 48) if orientation <= 4 else (48, 32))
    assert np.array_equal(image.pixels, np.asarray(upright))


@pytest.mark.parametrize("orientation", [65535, 0, 9])
def test_an_orientation_that_means_nothing_leaves_the_picture_as_it_is(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encoded(gradient(), "PNG", exif=exif), limits=LIMITS)
    assert not image.orientation_applied
    assert image.size == (32, 48)


def test_one_pixel_is_a_picture() -> None:
    assert decode_image(encoded(gradient(1, 1), "PNG"), limits=LIMITS).pixels.tolist() == [[[0, 0, 30]]]


@pytest.mark.parametrize("image_format", FORMATS)
def test_pixel_limit_holds_for_every_format_and_includes_the_limit(image_format: str) -> None:
    data = encoded(gradient(10, 10), image_format)
    assert decode_image(data, limits=ImageLimits(max_image_pixels=100)).size == (10, 10)
    with pytest.raises(TooLargeError, match="10 x 10 pixels; at most 99 in all"):
        decode_image(data, limits=ImageLimits(max_image_pixels=99))


def test_side_and_aspect_are_limited() -> None:
    limits = ImageLimits(max_image_pixels=1000, max_side_pixels=40, max_aspect_ratio=20)
    assert decode_image(encoded(gradient(40, 2), "PNG"), limits=limits).size == (2, 40)
    with pytest.raises(TooLargeError, match="41 x 2 pixels; at most 40 a side"):
        decode_image(encoded(gradient(41, 2), "PNG"), limits=limits)
    with pytest.raises(TooLargeError, match="21 x 1 pixels; a side may be 20 times the other"):
        decode_image(encoded(gradient(21, 1), "PNG"), limits=limits)


def test_huge_header_is_refused_without_the_memory_for_its_pixels() -> None:
    """40000 x 40000 pixels are 4.8 GB; the process may have 1 GB."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
        "from service.errors import TooLargeError\n"
        "from service.imaging.decode import ImageLimits, decode_image\n"
        "try: decode_image(sys.stdin.buffer.read(), limits=ImageLimits(max_image_pixels=50_000_000))\n"
        "except TooLargeError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=png_header(40_000, 40_000), capture_output=True)
    assert done.stdout.startswith(b"40000 x 40000 pixels"), done.stderr


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_file_is_refused(image_format: str, kept: float) -> None:
    noise = PIL.Image.effect_noise((64, 64), 80).convert("RGB")
    data = encoded(noise, image_format)
    with pytest.raises(InvalidImageError, match=image_format):
        decode_image(data[: int(kept * len(data))], limits=LIMITS)


def test_damaged_data_are_called_damaged_in_words_of_ours() -> None:
    """Pillow speaks of a broken data stream."""
    data = bytearray(encoded(gradient(), "JPEG"))
    table = data.index(b"\xff\xc4")  # a Huffman table: 17 bytes of counts, which may not add up to more than 256
    data[table + 5 : table + 21] = b"\xff" * 16
    with pytest.raises(InvalidImageError, match=r"^the JPEG data are damaged, or of a kind that we do not read$"):
        decode_image(bytes(data), limits=LIMITS)


def test_a_truncated_progressive_jpeg_is_refused() -> None:
    data = encoded(gradient(200, 200), "JPEG", progressive=True)
    with pytest.raises(InvalidImageError, match="truncated"):
        decode_image(data[:-100], limits=LIMITS)


def test_zero_pixels_are_refused() -> None:
    with pytest.raises(InvalidImageError, match="0 x 5 pixels"):
        decode_image(png_header(0, 5), limits=LIMITS)


def hostile_files() -> list[dict[str, object]]:
    manifest = HOSTILE / "manifest.json"
    files: list[dict[str, object]] = json.loads(manifest.read_text())["files"] if manifest.is_file() else []
    return files


def reference_pixels(data: bytes) -> UInt8Array:
    with PIL.Image.open(io.BytesIO(data)) as picture:
        return rgb_pixels(PIL.ImageOps.exif_transpose(picture))


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.skipif(not hostile_files(), reason="../shared/hostile is not here")
def test_every_hostile_file_becomes_an_image_or_one_of_the_three_errors() -> None:
    """279 files in a second or two; what Pillow reads too, we read to the same pixels."""
    ours = {"jpeg", "png", "gif", "webp", "tiff", "bmp"}
    # Turned by means other than EXIF, which we ignore; and refused: cut off in its last chunk, 65280 rows of 16 pixels.
    different = ["exif_imagemagick_orientation", "xmp_tags_orientation_exiftool", "902493e2a1177", "1f1629670972"]
    for file in hostile_files():
        path = str(file["path"])
        data = (HOSTILE / path).read_bytes()
        expected = file.get("expect", "accept" if file["out"] == "ok" and file["magic"] in ours else "either")
        try:
            image = decode_image(data, limits=LIMITS)
        except (InvalidImageError, UnsupportedImageError, TooLargeError) as error:
            assert expected != "accept" or any(name in path for name in different), f"{path}: {error}"
        else:
            assert expected != "reject", path
            if file["out"] == "ok" and not any(name in path for name in different):
                assert np.array_equal(image.pixels, reference_pixels(data)), path


SEEDS = [
    encoded(gradient(12, 8), "JPEG"),
    encoded(gradient(12, 8), "JPEG", progressive=True),
    encoded(gradient(12, 8), "PNG"),
    encoded(gradient(12, 8).convert("P"), "PNG", transparency=3),
    encoded(gradient(12, 8), "WebP"),
    encoded(gradient(12, 8), "GIF", comment=b"hello", transparency=2),
    encoded(gradient(12, 8), "BMP"),
    encoded(gradient(12, 8), "TIFF"),
    encoded(gradient(12, 8), "TIFF", compression="tiff_lzw"),
]


def decode_or_refuse(data: bytes) -> None:
    try:
        image = decode_image(data, limits=ImageLimits(max_image_pixels=1_000_000))
    except (InvalidImageError, UnsupportedImageError, TooLargeError) as error:
        assert str(error)
    else:
        assert 0 < image.height * image.width <= 1_000_000


@settings(deadline=None, max_examples=200)
@given(signature=st.sampled_from([seed[:12] for seed in SEEDS] + [b""]), rest=st.binary(max_size=200))
def test_random_bytes_are_refused_with_a_message(signature: bytes, rest: bytes) -> None:
    decode_or_refuse(signature + rest)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(deadline=None, max_examples=300)
@given(
    seed=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6),
    kept=st.floats(0.5, 1),
)
def test_mutated_files_decode_or_are_refused(seed: bytes, changes: list[tuple[float, bytes]], kept: float) -> None:
    data = bytearray(seed)
    for where, replacement in changes:
        start = int(where * len(data))
        data[start : start + len(replacement)] = replacement
    decode_or_refuse(bytes(data[: int(kept * len(data))]))


def test_lack_of_memory_is_not_the_fault_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pixels: object, orientation: int) -> None:
        raise MemoryError

    monkeypatch.setattr(decode, "_turned_upright", fail)
    with pytest.raises(OutOfMemoryError, match="not enough memory"):
        decode_image(encoded(gradient(), "PNG"), limits=LIMITS)


@pytest.mark.parametrize("image_format", FORMATS)
def test_decoding_stops_when_nobody_waits(image_format: str) -> None:
    with pytest.raises(CancelledRequestError):
        decode_image(encoded(gradient(), image_format), limits=LIMITS, should_stop=lambda: True)


def test_a_large_picture_asks_many_times_whether_to_stop() -> None:
    noise = PIL.Image.effect_noise((1000, 1000), 80).convert("RGB")
    asked = itertools.count()
    decode_image(encoded(noise, "PNG"), limits=LIMITS, should_stop=lambda: next(asked) < 0)
    assert next(asked) > 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "I;16", "F", "CMYK", "1"])
def test_bands_make_the_same_pixels_as_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode in ("F", "I;16"):
        levels = np.random.default_rng(0).uniform(0, 60_000, (37, 50))
        picture = PIL.Image.fromarray(levels.astype(np.float32 if mode == "F" else np.uint16))
    else:
        picture = gradient(50, 37).convert(mode)
    whole = rgb_pixels(picture)
    monkeypatch.setattr(pixels, "_BAND_PIXELS", 500)
    assert np.array_equal(rgb_pixels(picture), whole)
