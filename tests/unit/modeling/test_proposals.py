from __future__ import annotations

import numpy as np
import pytest

from service.errors import ServiceError
from service.modeling.config import ProposalsConfig
from service.modeling.proposals import selective_search
from service.structures import UInt8Array

SMALL = ProposalsConfig(search_width=80)


def two_squares() -> UInt8Array:
    """A red and a green square on grey, 160 x 120."""
    pixels = np.full((120, 160, 3), 90, dtype=np.uint8)
    pixels[20:60, 16:56] = (250, 20, 20)
    pixels[60:110, 90:150] = (20, 250, 20)
    return pixels


def test_the_objects_are_among_the_proposals_in_pixels_of_the_picture() -> None:
    found = selective_search(two_squares(), SMALL)
    for box in ([16, 20, 56, 60], [90, 60, 150, 110]):
        assert np.abs(found - box).max(axis=1).min() <= 4  # two pixels of the smaller picture
    assert len(np.unique(found, axis=0)) == len(found)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] <= (160, 120)).all()


def test_the_same_picture_has_the_same_proposals_and_as_many_as_asked_for() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    found = selective_search(noise, SMALL)
    np.testing.assert_array_equal(found, selective_search(noise, SMALL))
    assert len(found) > 5
    few = selective_search(noise, SMALL.model_copy(update={"max_count": 5}))
    np.testing.assert_array_equal(few, found[:5])


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_odd_pictures_are_searched_too(size: tuple[int, int]) -> None:
    found = selective_search(np.zeros((*size, 3), dtype=np.uint8), SMALL)
    assert found.shape[1] == 4
    assert (found[:, 2:] <= (size[1], size[0])).all()


def test_an_opencv_without_its_contributed_modules_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("cv2.ximgproc")
    with pytest.raises(ServiceError, match="opencv-contrib-python-headless"):
        selective_search(two_squares(), SMALL)
