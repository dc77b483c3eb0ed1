"""RLE of masks: torchvision's or detectron2's pixels in pycocotools' encoding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco

from service.masks.rle import encode_rle
from service.structures import MaskStyle
from tests.unit.masks.cases import objects, pasted, sampled


@pytest.mark.parametrize("image_size", [(480, 640), (64, 48), (37, 211), (1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("threshold", [0.3, 0.5])
def test_encoding_is_that_of_pasting_and_pycocotools(image_size: tuple[int, int], threshold: float) -> None:
    for seed in range(4):
        masks, boxes = objects(seed, image_size)
        expected = coco.encode(np.asfortranarray(pasted(masks, boxes, image_size, threshold).transpose(1, 2, 0)))
        encoded = encode_rle(masks, boxes, image_size, threshold)
        assert [one["counts"].encode() for one in encoded] == [one["counts"] for one in expected]
        assert all(one["size"] == list(image_size) for one in encoded)


def test_hard_edges_fall_on_the_same_pixels() -> None:
    """Half-way between 0 and 1 a pixel is exactly at the threshold, so its last bit decides: we round as torch does."""
    rng = np.random.default_rng(0)
    masks = (rng.random((60, 28, 28)) > 0.5).astype(np.float32)
    centers, sides = rng.random((60, 2)) * [400, 300], rng.integers(200, 900, (60, 2))
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1).astype(np.float32).round()
    decoded = coco.decode(encode_rle(masks, boxes, (300, 400)))
    assert np.array_equal(decoded.transpose(2, 0, 1), pasted(masks, boxes, (300, 400)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 200), width=st.integers(1, 200), size=st.integers(1, 40))
def test_any_probabilities_in_any_boxes_keep_the_pixels_of_pasting(
    seed: int, height: int, width: int, size: int
) -> None:
    masks = np.random.default_rng(seed).random((12, size, size), dtype=np.float32)
    _, boxes = objects(seed, (height, width))
    decoded = coco.decode(encode_rle(masks, boxes, (height, width)))
    differing = decoded.transpose(2, 0, 1) != pasted(masks, boxes, (height, width))
    # Noise is at its worst here: a probability within float32's rounding of the threshold may fall on either side.
    assert differing.sum() <= 1


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(1, 200),
    width=st.integers(1, 200),
    size=st.integers(1, 40),
    threshold=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_detectron2s_style_keeps_the_pixels_that_it_samples(
    seed: int, height: int, width: int, size: int, threshold: float
) -> None:
    masks = np.random.default_rng(seed).random((12, size, size), dtype=np.float32)
    _, boxes = objects(seed, (height, width))
    probabilities = sampled(masks, boxes, (height, width))
    decoded = coco.decode(encode_rle(masks, boxes, (height, width), threshold, style="detectron2"))
    differing = decoded.transpose(2, 0, 1) != (probabilities >= threshold)
    # float32 places a pixel of a tiny box to about 1e-5 of a mask's cell.
    assert np.abs(probabilities[differing] - threshold).max(initial=0) < 1e-4


@pytest.mark.parametrize("image_size", [(480, 640), (37, 211), (1, 3000), (3000, 1)])
def test_detectron2s_style_keeps_soft_and_hard_edges_where_they_are(image_size: tuple[int, int]) -> None:
    for seed in range(4):
        masks, boxes = objects(seed, image_size)
        decoded = coco.decode(encode_rle(masks, boxes, image_size, style="detectron2")).transpose(2, 0, 1)
        expected = sampled(masks, boxes, image_size)
        # Half-way between 0 and 1 a pixel is exactly at the threshold.
        clear = np.abs(expected - 0.5) > 1e-4
        assert clear.mean() > 0.99
        assert np.array_equal(decoded[clear], (expected >= 0.5)[clear])


def test_a_full_mask_in_detectron2s_style_is_the_pixels_whose_centers_lie_in_the_box() -> None:
    boxes = np.array([[2.4, 3, 10.6, 11]], np.float32)
    decoded = coco.decode(encode_rle(np.ones((1, 4, 4), np.float32), boxes, (16, 16), style="detectron2"))[:, :, 0]
    rows, columns = np.nonzero(decoded)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 10, 2, 10)


def test_full_mask_fills_its_box_without_the_corners() -> None:
    """Towards the padding the probability falls along each side to one half at the edge, in a corner to one quarter."""
    masks, boxes = np.ones((1, 4, 4), np.float32), np.array([[2, 3, 10, 11]], np.float32)
    decoded = coco.decode(encode_rle(masks, boxes, (16, 16)))[:, :, 0]
    rows, columns = np.nonzero(decoded)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 11, 2, 10)
    assert decoded.sum() == 9 * 9 - 4


def test_empty_mask_is_one_run_of_zeros() -> None:
    encoded = encode_rle(np.zeros((1, 28, 28), np.float32), np.array([[1, 1, 5, 5]], np.float32), (6, 7))
    assert encoded == [
        {"size": [6, 7], "counts": coco.encode(np.zeros((6, 7), np.uint8, order="F"))["counts"].decode()}
    ]


def test_no_detections_give_no_masks() -> None:
    assert encode_rle(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32), (480, 640)) == []


@pytest.mark.parametrize("style", get_args(MaskStyle))
def test_boxes_outside_and_inside_out_have_no_pixels(style: MaskStyle) -> None:
    boxes = np.array([[-50, -50, -20, -20], [700, 10, 800, 20], [30, 30, 10, 10]], np.float32)
    encoded = encode_rle(np.ones((3, 28, 28), np.float32), boxes, (480, 640), style=style)
    assert coco.area(encoded).tolist() == [0, 0, 0]


@pytest.mark.parametrize("style", get_args(MaskStyle))
def test_box_a_million_times_the_image_costs_no_more_than_the_image(style: MaskStyle) -> None:
    boxes = np.array([[-5e8, -5e8, 5e8, 5e8]], np.float32)
    encoded = encode_rle(np.ones((1, 28, 28), np.float32), boxes, (20, 30), style=style)
    assert coco.area(encoded).tolist() == [600]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_box_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        encode_rle(np.ones((1, 28, 28), np.float32), np.array([[0, 0, bad, 5]], np.float32), (10, 10))


def test_probability_that_is_no_number_is_no_pixel() -> None:
    masks, boxes = np.ones((1, 28, 28), np.float32), np.array([[0, 0, 28, 28]], np.float32)
    masks[0, 10, 10] = np.nan
    decoded = coco.decode(encode_rle(masks, boxes, (30, 30)))[:, :, 0]
    assert decoded[10, 10] == 0
    assert decoded[20, 20] == 1


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 28, 28\) and \(3, 4\)"):
        encode_rle(np.ones((2, 28, 28), np.float32), np.ones((3, 4), np.float32), (10, 10))


def test_threads_do_not_disturb_one_another() -> None:
    masks, boxes = objects(0, (480, 640), number=40)
    alone = encode_rle(masks, boxes, (480, 640))
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda _: encode_rle(masks, boxes, (480, 640)), range(16)))
    assert all(one == alone for one in together)
