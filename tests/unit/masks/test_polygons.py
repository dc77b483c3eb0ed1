"""Polygons of masks: outlines that pycocotools fills with the very pixels."""

from __future__ import annotations

from typing import get_args

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from service.masks.polygons import encode_outlines, encode_polygons, outer_pixels, polygon_area
from service.masks.rle import encode_rle
from service.structures import Int64Array, MaskStyle, UInt8Array
from tests.unit.masks.cases import drawn, objects


def filled(polygons: list[Int64Array], image_size: tuple[int, int]) -> UInt8Array:
    """(H, W): what COCO's tools make of one object's polygons."""
    if not polygons:
        return np.zeros(image_size, np.uint8)
    pixels: UInt8Array = coco.decode(
        coco.merge(coco.frPyObjects([polygon.tolist() for polygon in polygons], *image_size))
    )
    return pixels


def signed_area(polygon: Int64Array | list[int]) -> float:
    """Positive for clockwise on the screen, where y points down."""
    x, y = np.array(polygon).reshape(-1, 2).T
    return float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)) / 2)


def outline(*picture: str) -> list[Int64Array]:
    masks, boxes, image_size = drawn(list(picture))
    [polygons] = encode_polygons(masks, boxes, image_size)
    assert np.array_equal(filled(polygons, image_size), masks[0])
    return polygons


def corners(polygon: Int64Array) -> set[tuple[int, int]]:
    return set(zip(polygon[::2], polygon[1::2], strict=True))


def test_one_pixel_is_its_four_corners() -> None:
    [polygon] = outline("...", ".#.", "...")
    assert len(polygon) == 8
    assert corners(polygon) == {(1, 1), (2, 1), (2, 2), (1, 2)}


def test_straight_edges_have_no_corners_between() -> None:
    [polygon] = outline("....", ".##.", "..#.", "....")
    assert len(polygon) == 12
    assert corners(polygon) == {(1, 1), (3, 1), (3, 3), (2, 3), (2, 2), (1, 2)}


def test_parts_that_meet_at_a_corner_are_polygons_of_their_own() -> None:
    assert len(outline("#.#", ".#.", "#.#")) == 5
    assert len(outline("..#", ".#.", "#..")) == 3


def test_hole_is_cut_into_its_outline() -> None:
    [polygon] = outline("......", ".####.", ".#..#.", ".#..#.", ".####.", "......")
    assert signed_area(polygon) == 4 * 4 - 2 * 2
    assert corners(polygon) >= {(1, 1), (5, 1), (5, 5), (1, 5), (2, 2), (4, 2), (4, 4), (2, 4)}


def test_several_holes_are_one_polygon_and_an_island_in_a_hole_another() -> None:
    assert len(outline("#####", "#.#.#", "#####", "#.#.#", "#####")) == 1
    ring, island = outline("#####", "#...#", "#.#.#", "#...#", "#####")
    assert (signed_area(ring), signed_area(island)) == (16, 1)


def test_empty_mask_has_no_polygons() -> None:
    assert outline("...", "...", "...") == []


def test_no_detections_give_no_polygons() -> None:
    assert encode_polygons(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (480, 640)) == []


@pytest.mark.parametrize("style", get_args(MaskStyle))
@pytest.mark.parametrize("image_size", [(120, 160), (37, 211), (1, 1), (1, 3000), (3000, 1)])
def test_filling_gives_back_the_mask(image_size: tuple[int, int], style: MaskStyle) -> None:
    for seed in range(4):
        masks, boxes = objects(seed, image_size)
        decoded = coco.decode(encode_rle(masks, boxes, image_size, style=style))
        for index, polygons in enumerate(encode_polygons(masks, boxes, image_size, style=style)):
            assert np.array_equal(filled(polygons, image_size), decoded[:, :, index])
            assert all(len(polygon) >= 8 and signed_area(polygon) > 0 for polygon in polygons)


@settings(max_examples=60, deadline=None)
@given(
    pixels=st.integers(1, 12).flatmap(
        lambda side: st.lists(st.text("#.", min_size=side, max_size=side), min_size=side, max_size=side)
    )
)
def test_filling_gives_back_any_pattern_and_areas_add_up(pixels: list[str]) -> None:
    """Checkerboards, combs, holes in holes: the area shows that holes are inside their polygons, not beside them."""
    polygons = outline(*pixels)
    assert sum(map(signed_area, polygons)) == sum(row.count("#") for row in pixels)


def test_outline_of_a_slope_has_no_steps_and_its_hole_is_filled() -> None:
    [[outline]] = encode_outlines(
        *drawn(["#.......", "##......", "###.....", "#.##....", "#####...", "######.."] + ["#######."] * 2)
    )
    assert len(outline) <= 10
    assert signed_area(outline) >= 31


@pytest.mark.parametrize("image_size", [(120, 160), (37, 211), (400, 300)])
def test_outlines_have_fewer_corners_and_lie_close_to_the_mask(image_size: tuple[int, int]) -> None:
    masks, boxes = objects(5, image_size)
    for exact, outlines in zip(
        encode_polygons(masks, boxes, image_size), encode_outlines(masks, boxes, image_size), strict=True
    ):
        assert len(outlines) == len(exact)  # an island in a hole is an outline, too
        assert sum(map(len, outlines)) <= sum(map(len, exact))
        for outline in outlines:
            assert len(outline) >= 6
            corners = np.array(outline).reshape(-1, 2)
            edges = np.concatenate([np.array(polygon).reshape(-1, 2) for polygon in exact])
            assert all(np.abs(edges - corner).sum(axis=1).min() == 0 for corner in corners)  # chosen among its corners
        areas = [abs(signed_area(outline)) for outline in outlines]
        assert areas == sorted(areas, reverse=True)


@pytest.mark.parametrize("seed", range(4))
def test_opencv_fills_the_outer_pixels_to_the_very_mask(seed: int) -> None:
    image_size = (90, 120)
    masks, boxes = objects(seed, image_size, number=30)
    for polygon in (one for polygons in encode_polygons(masks, boxes, image_size) for one in polygons):
        pixels = filled([polygon], image_size)
        corners = np.array(outer_pixels(polygon), np.int32)
        assert np.array_equal(cv2.fillPoly(np.zeros(image_size, np.uint8), [corners], 1), pixels)
        assert polygon_area(polygon) == pixels.sum()


def test_outer_pixels_of_a_thin_cross() -> None:
    [polygon] = outline(".#...", "####.", ".#...", ".....", ".....")
    painted = cv2.fillPoly(np.zeros((5, 5), np.uint8), [np.array(outer_pixels(polygon), np.int32)], 1)
    assert painted.tolist() == [[0, 1, 0, 0, 0], [1, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0] * 5, [0] * 5]
