"""A device decodes baseline JPEGs, and nothing else: what it gets, what comes before, and what happens if it fails."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import PIL.Image
import pytest
import simplejpeg

from service.errors import CancelledRequestError, InvalidImageError, OutOfMemoryError, TooLargeError
from service.imaging.containers.jpeg import read_jpeg
from service.imaging.decode import ImageLimits, decode_image
from service.imaging.jpeg_check import checked_decoder, fixed_jpeg
from service.structures import UInt8Array

LIMITS = ImageLimits(max_image_pixels=100_000)


class FakeDevice:
    """Decodes on the CPU, one level brighter, so that it shows who decoded."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self._error = error

    def __call__(self, data: bytes) -> UInt8Array:
        self.calls += 1
        if self._error is not None:
            raise self._error
        return on_cpu(data) + np.uint8(1)


def on_cpu(data: bytes) -> UInt8Array:
    pixels: UInt8Array = simplejpeg.decode_jpeg(data)
    return pixels


def picture() -> PIL.Image.Image:
    y, x = np.mgrid[:64, :96]
    return PIL.Image.fromarray(np.dstack([x * 2, y * 3, np.full_like(x, 30)]).astype(np.uint8))


def encoded(mode: str = "RGB", image_format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    picture().convert(mode).save(file, image_format, **options)
    return file.getvalue()


def by_opencv(subsampling: str) -> bytes:
    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{subsampling}")
    return cv2.imencode(".jpg", np.asarray(picture()), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor])[1].tobytes()


def with_frame_byte(offset: int, value: int) -> bytes:
    """A JPEG with another byte at this offset from its frame header's marker."""
    data = bytearray(encoded())
    data[data.index(b"\xff\xc0") + offset] = value
    return bytes(data)


def with_adobe(transform: int) -> bytes:
    data = encoded()
    return data[:2] + b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform]) + data[2:]


BASELINE = {
    **{subsampling: by_opencv(subsampling) for subsampling in ("444", "422", "420", "440", "411")},
    "Pillow": encoded(),
    "restart markers": encoded(restart_marker_blocks=1),
    "metadata": encoded(comment=b"a" * 1000, icc_profile=b"b" * 1000),
    "Adobe YCbCr": with_adobe(1),
    "bytes after the end": encoded() + bytes(100),
    "fill bytes": encoded().replace(b"\xff\xda", b"\xff\xff\xff\xda"),
}
OTHERS = {
    "grey": encoded("L"),
    "CMYK": encoded("CMYK"),
    "progressive": encoded(progressive=True),
    "RGB": encoded(keep_rgb=True),
    "PNG": encoded(image_format="PNG"),
    "a TIFF with JPEG in it": encoded(image_format="TIFF", compression="jpeg"),
}
NOT_BASELINE = {
    "extended": with_frame_byte(1, 0xC1),
    "lossless": with_frame_byte(1, 0xC3),
    "arithmetic coding": with_frame_byte(1, 0xC9),
    "12 bits": with_frame_byte(4, 12),
    "other component numbers": with_frame_byte(10, 0),
    "colours larger than brightness": with_frame_byte(14, 0x22),
    "three times as many": with_frame_byte(11, 0x31),
    "Adobe RGB": with_adobe(0),
    "no end marker": encoded()[:-2],
    "truncated": encoded()[:-100],
    "one component in the scan": encoded().replace(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x0c\x01"),
}


@pytest.mark.parametrize("kind", BASELINE)
def test_the_device_decodes_baseline_jpegs(kind: str) -> None:
    device = FakeDevice()
    image = decode_image(BASELINE[kind], limits=LIMITS, jpeg_decoder=device)
    assert device.calls == 1
    assert np.array_equal(image.pixels, on_cpu(BASELINE[kind]) + np.uint8(1))


@pytest.mark.parametrize("kind", OTHERS)
def test_the_cpu_decodes_everything_else(kind: str) -> None:
    device = FakeDevice()
    image = decode_image(OTHERS[kind], limits=LIMITS, jpeg_decoder=device)
    assert device.calls == 0
    assert np.array_equal(image.pixels, decode_image(OTHERS[kind], limits=LIMITS).pixels)


@pytest.mark.parametrize("kind", NOT_BASELINE)
def test_no_rare_or_unfinished_jpeg_is_taken_for_a_baseline_one(kind: str) -> None:
    assert read_jpeg(encoded()).is_baseline_jpeg
    assert not read_jpeg(NOT_BASELINE[kind]).is_baseline_jpeg


def test_a_truncated_file_gets_the_error_of_the_cpu() -> None:
    device = FakeDevice()
    with pytest.raises(InvalidImageError, match="truncated"):
        decode_image(NOT_BASELINE["truncated"], limits=LIMITS, jpeg_decoder=device)
    assert device.calls == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_the_device_decoded_is_turned_upright(orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encoded(exif=exif)
    image = decode_image(data, limits=LIMITS, jpeg_decoder=FakeDevice())
    assert np.array_equal(image.pixels, decode_image(data, limits=LIMITS).pixels + np.uint8(1))
    assert image.orientation_applied == (orientation != 1)


def test_limits_and_the_place_for_the_pixels_come_first() -> None:
    device = FakeDevice()
    with pytest.raises(TooLargeError):
        decode_image(encoded(), limits=ImageLimits(max_image_pixels=6143), jpeg_decoder=device)
    taken = []

    def take(pixels: int) -> None:
        taken.append((pixels, device.calls))

    with pytest.raises(CancelledRequestError):
        decode_image(encoded(), limits=LIMITS, should_stop=lambda: True, before_decoding=take, jpeg_decoder=device)
    assert device.calls == 0
    decode_image(encoded(), limits=LIMITS, before_decoding=take, jpeg_decoder=device)
    assert taken == [(6144, 0), (6144, 0)]


def one_row_less(data: bytes) -> UInt8Array:
    return on_cpu(data)[1:]


@pytest.mark.parametrize("device", [FakeDevice(RuntimeError("nvjpegDecode failed: 5")), one_row_less])
def test_the_cpu_decodes_what_the_device_fails_at(device: Callable[[bytes], UInt8Array]) -> None:
    image = decode_image(encoded(), limits=LIMITS, jpeg_decoder=device)
    assert np.array_equal(image.pixels, on_cpu(encoded()))


def test_a_file_that_neither_decodes_gets_the_error_of_the_cpu() -> None:
    data = bytearray(encoded())
    table = data.index(b"\xff\xc4")
    data[table + 5 : table + 21] = b"\xff" * 16
    device = FakeDevice(RuntimeError("nvjpegDecode failed: 2"))
    with pytest.raises(InvalidImageError, match="the JPEG data are damaged"):
        decode_image(bytes(data), limits=LIMITS, jpeg_decoder=device)
    assert device.calls == 1


def test_the_cpu_does_not_try_what_nobody_waits_for_any_more() -> None:
    device = FakeDevice(RuntimeError("nvjpegDecode failed: 5"))
    with pytest.raises(CancelledRequestError):
        decode_image(encoded(), limits=LIMITS, should_stop=lambda: device.calls > 0, jpeg_decoder=device)


def test_a_lack_of_host_memory_is_called_that() -> None:
    with pytest.raises(OutOfMemoryError):
        decode_image(encoded(), limits=LIMITS, jpeg_decoder=FakeDevice(MemoryError()))


def fast(data: bytes) -> UInt8Array:
    """Rounds more coarsely, and repeats colours instead of interpolating."""
    pixels: UInt8Array = simplejpeg.decode_jpeg(data, fastdct=True, fastupsample=True)
    return pixels


def test_the_check_lets_decoders_round_and_enlarge_colours_as_they_like() -> None:
    assert read_jpeg(fixed_jpeg()).is_baseline_jpeg
    assert not np.array_equal(fast(fixed_jpeg()), on_cpu(fixed_jpeg()))
    for decoder in (on_cpu, fast):
        assert checked_decoder(decoder) is decoder


def limited_range(data: bytes) -> UInt8Array:
    return ((on_cpu(data).astype(np.float32) - 16) * 255 / 219).clip(0, 255).astype(np.uint8)


def swapped_planes(data: bytes) -> UInt8Array:
    planes = cv2.cvtColor(on_cpu(data), cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    return cv2.cvtColor(planes, cv2.COLOR_YCrCb2RGB).astype(np.uint8)


def bt709(data: bytes) -> UInt8Array:
    y, r, b = np.moveaxis(cv2.cvtColor(on_cpu(data), cv2.COLOR_RGB2YCrCb).astype(np.float32) - [0, 128, 128], 2, 0)
    return np.dstack([y + 1.5748 * r, y - 0.1873 * b - 0.4681 * r, y + 1.8556 * b]).clip(0, 255).astype(np.uint8)


def unfinished(data: bytes) -> UInt8Array:
    pixels = on_cpu(data)
    pixels[-16:] = 128
    return pixels


@pytest.mark.parametrize(
    ("decoder", "reason"),
    [
        (lambda data: on_cpu(data)[..., ::-1], "differ from the CPU's by up to 73 levels"),
        (lambda data: np.roll(on_cpu(data), 1, axis=1), "differ from the CPU's"),
        (lambda data: on_cpu(data) + np.uint8(3), "3.00 on average"),
        (limited_range, "differ from the CPU's"),
        (swapped_planes, "differ from the CPU's"),
        (bt709, "differ from the CPU's"),
        (unfinished, "differ from the CPU's"),
        (one_row_less, r"expected pixels of (270, 470, 3), got (269, 470, 3)"),
        (FakeDevice(RuntimeError("no memory\nand more")), "no memory"),
    ],
)
def test_a_decoder_that_reads_wrongly_is_not_used(
    decoder: Callable[[bytes], UInt8Array], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert checked_decoder(decoder) is None
    [record] = caplog.records
    assert "fails its check; the CPU decodes" in record.message
    assert reason in vars(record)["fields"]["reason"]
