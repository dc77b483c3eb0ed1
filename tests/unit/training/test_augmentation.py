from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.training.augmentation import Augmentation, TrainingPicture, augment
from service.training.dataset import load_coco
from tests.coco_folder import write_coco_folder

PLAIN = Augmentation(crop_size=128, scale_range=(1.0, 1.0), flips=False, colour=0.0, noise=0.0, blur=0.0)
FILL = (10.0, 20.0, 30.0)


def pictures(folder: Path, augmentation: Augmentation, *, scale: float, count: int = 20) -> list[TrainingPicture]:
    samples = load_coco(write_coco_folder(folder / "data") / "train.json").samples
    rng = np.random.default_rng(0)
    return [
        augment(samples[index % len(samples)], scale=scale, augmentation=augmentation, fill=FILL, rng=rng)
        for index in range(count)
    ]


def test_without_changes_the_picture_is_only_moved(tmp_path: Path) -> None:
    samples = load_coco(write_coco_folder(tmp_path) / "train.json").samples
    picture = augment(samples[0], scale=1.0, augmentation=PLAIN, fill=FILL, rng=np.random.default_rng(0))
    # 96 rows in a square of 128: one box tells by how much; borders of a fraction of a pixel are interpolated.
    shift = picture.boxes[0] - samples[0].boxes[0]
    assert shift[0] == pytest.approx(0)
    assert 0 <= shift[1] <= 32
    np.testing.assert_allclose(picture.boxes, samples[0].boxes + shift, atol=1e-4)
    np.testing.assert_array_equal(picture.labels, samples[0].labels)
    if shift[1] >= 1:
        np.testing.assert_array_equal(picture.pixels[0, 0], FILL)


@pytest.mark.parametrize("scale", [0.6, 1.0, 1.7])
def test_flips_turns_and_scales_move_masks_boxes_and_pixels_alike(tmp_path: Path, scale: float) -> None:
    strong = replace(PLAIN, crop_size=160, scale_range=(0.8, 1.25), flips=True)
    seen = 0
    for picture in pictures(tmp_path, strong, scale=scale):
        assert picture.pixels.shape == (160, 160, 3)
        assert picture.masks is not None
        for box, mask in zip(picture.boxes, picture.masks, strict=True):
            rows, columns = np.nonzero(mask)
            drawn = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            if box.min() > 0 and box.max() < 160:  # of a disc that the border cuts, less is left than of its box
                np.testing.assert_allclose(drawn, box, atol=1.6)
                seen += 1
            # Discs are the only red things there are.
            assert (picture.pixels[mask > 0][:, 0] > 100).mean() > 0.9
    assert seen > 20


def test_objects_that_the_crop_cuts_away_are_gone(tmp_path: Path) -> None:
    small = replace(PLAIN, crop_size=40)
    for picture in pictures(tmp_path, small, scale=1.0):
        assert (picture.boxes >= 0).all()
        assert (picture.boxes <= 40).all()
        assert ((picture.boxes[:, 2:] - picture.boxes[:, :2]) >= 2).all()
        assert len(picture.boxes) == len(picture.labels) == len(picture.masks if picture.masks is not None else [])


def test_the_same_generator_gives_the_same_picture(tmp_path: Path) -> None:
    samples = load_coco(write_coco_folder(tmp_path) / "train.json").samples
    full = replace(PLAIN, scale_range=(0.5, 2.0), flips=True, colour=1.0, noise=10.0, blur=2.0)
    first, second = (
        augment(samples[1], scale=1.0, augmentation=full, fill=FILL, rng=np.random.default_rng(3)) for _ in range(2)
    )
    np.testing.assert_array_equal(first.pixels, second.pixels)
    np.testing.assert_array_equal(first.boxes, second.boxes)


def test_proposals_move_with_the_objects_and_those_outside_the_crop_are_gone(tmp_path: Path) -> None:
    samples = load_coco(write_coco_folder(tmp_path) / "train.json").samples
    strong = replace(PLAIN, crop_size=60, scale_range=(0.8, 1.25), flips=True)
    rng = np.random.default_rng(0)
    left, gone = 0, 0
    for sample in samples:
        picture = augment(sample, scale=1.0, augmentation=strong, fill=FILL, rng=rng, proposals=sample.boxes)
        assert picture.proposals is not None
        # The objects' own boxes as proposals: each object that is left has one where it is.
        assert set(map(tuple, picture.boxes)) <= set(map(tuple, picture.proposals))
        assert ((picture.proposals >= 0) & (picture.proposals <= 60)).all()
        left += len(picture.boxes)
        gone += len(sample.boxes) - len(picture.proposals)
    assert left > 0
    assert gone > 0
