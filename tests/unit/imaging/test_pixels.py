"""What Pillow's modes become in RGB. Pictures of one row, so that every number can be checked by hand."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from service.imaging.pixels import rgb_pixels


def row(picture: PIL.Image.Image) -> list[list[int]]:
    pixels: list[list[int]] = rgb_pixels(picture)[0].tolist()
    return pixels


def grey(*levels: int) -> list[list[int]]:
    return [[level] * 3 for level in levels]


def test_16_bit_grey_is_scaled_from_its_full_range() -> None:
    """Pillow's own conversion clips at 255: all but the first pixel would be white."""
    values: NDArray[np.uint16] = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert row(PIL.Image.fromarray(values)) == grey(0, 1, 128, 255)


def test_12_bits_of_a_camera_are_stretched_if_asked() -> None:
    values: NDArray[np.uint16] = np.array([[100, 1124, 4095]], np.uint16)
    assert row(PIL.Image.fromarray(values)) == grey(0, 4, 16)
    assert rgb_pixels(PIL.Image.fromarray(values), intensity="stretch")[0].tolist() == grey(0, 65, 255)


def test_8_bits_stay_as_they_are_when_stretching_is_asked() -> None:
    values: NDArray[np.uint8] = np.array([[10, 20]], np.uint8)
    assert rgb_pixels(PIL.Image.fromarray(values), intensity="stretch")[0].tolist() == grey(10, 20)


def test_16_bit_grey_in_big_endian_order_reads_the_same() -> None:
    picture = PIL.Image.frombytes("I;16B", (2, 1), bytes([0x01, 0x01, 0xFF, 0xFF]))
    assert row(picture) == grey(1, 255)


def test_32_bit_integers_are_stretched_between_their_extremes() -> None:
    assert row(PIL.Image.fromarray(np.array([[-1000, 0, 1000]], np.int32))) == grey(0, 128, 255)


def test_floats_are_stretched_and_what_is_not_finite_is_black() -> None:
    values = np.array([[0.0, 0.2, 1.0, np.nan, np.inf, -np.inf]], np.float32)
    assert row(PIL.Image.fromarray(values)) == grey(0, 51, 255, 0, 0, 0)


@pytest.mark.parametrize("value", [7.0, np.nan])
def test_floats_without_a_range_are_black(value: float) -> None:
    assert row(PIL.Image.fromarray(np.full((1, 2), value, np.float32))) == grey(0, 0)


def test_one_bit_is_black_and_white() -> None:
    picture = PIL.Image.new("1", (2, 1))
    picture.putpixel((1, 0), 1)
    assert row(picture) == grey(0, 255)


def test_transparency_is_laid_over_white() -> None:
    picture = PIL.Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((255, 0, 51)):  # 51 / 255 = 20 % of red, 80 % of white
        picture.putpixel((x, 0), (255, 0, 0, alpha))
    assert row(picture) == [[255, 0, 0], [255, 255, 255], [255, 204, 204]]


def test_grey_with_alpha_is_laid_over_white() -> None:
    picture = PIL.Image.new("LA", (2, 1), (10, 255))
    picture.putpixel((1, 0), (10, 0))
    assert row(picture) == grey(10, 255)


def test_a_transparent_palette_entry_is_white() -> None:
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.info["transparency"] = 1
    assert row(picture) == [[10, 20, 30], [255, 255, 255]]


def test_alpha_of_255_throughout_changes_nothing() -> None:
    """Our nuclei pictures are like that, and the model was trained on their exact values."""
    values = np.arange(256 * 4, dtype=np.uint8).reshape(1, 256, 4)
    values[..., 3] = 255
    assert row(PIL.Image.fromarray(values, "RGBA")) == values[0, :, :3].tolist()


def test_cmyk_is_ink_on_white() -> None:
    picture = PIL.Image.new("CMYK", (3, 1))
    picture.putpixel((1, 0), (0, 255, 255, 0))
    picture.putpixel((2, 0), (0, 0, 0, 255))
    assert row(picture) == [[255, 255, 255], [255, 0, 0], [0, 0, 0]]
