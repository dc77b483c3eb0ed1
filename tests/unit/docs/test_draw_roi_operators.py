from pathlib import Path

import pytest
import torch

from docs.draw_roi_operators import FOLDER, landing_errors, landing_table, pictures, places_read
from service.ops import roi_align, roi_pool

PAGE = (Path(__file__).parents[3] / "docs" / "roi-operators.md").read_text(encoding="utf-8")


def test_pictures_on_the_page_show_what_the_operators_do_today() -> None:
    """If this fails, run `python -m docs.draw_roi_operators` and look at what changed."""
    for name, picture in pictures().items():
        assert f"(images/{name})" in PAGE
        assert (FOLDER / name).read_text(encoding="utf-8") == picture, name


def test_table_on_the_page_is_what_the_operators_do_today() -> None:
    assert landing_table() in PAGE


def test_worked_example_of_the_page_is_what_roi_pool_does() -> None:
    """665 pixels from 64 on: cells 2 to 23, which end at 768, and bins of 4 cells of 32 pixels, 3 apart."""
    first, last = places_read(roi_pool, (64, 64, 729, 729), 7, 32)
    assert (first[0, 0] - 16).tolist() == [64, 160, 256, 352, 448, 544, 640]
    assert (last[0, 0] + 16).tolist() == [192, 288, 384, 480, 576, 672, 768]


def test_places_of_an_averaging_operator_are_the_middles_of_its_bins() -> None:
    for places in places_read(roi_align, (64, 64, 729, 729), 7, 32):
        # Unaligned: half a cell to the right of the middles, which are 95 apart.
        torch.testing.assert_close(places[0, 0], 64 + 95 * (torch.arange(7.0, dtype=torch.float64) + 0.5) + 16)


@pytest.mark.parametrize("stride", [4, 32])
def test_roi_align_lands_equally_wherever_the_box_lies(stride: float) -> None:
    _, errors = landing_errors(roi_align, stride, side=64)
    torch.testing.assert_close(errors, torch.full_like(errors, stride / 2))
