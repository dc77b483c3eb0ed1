from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import DatasetError
from service.training.dataset import load_coco


def write(folder: Path, *annotations: dict[str, Any], files: bool = True) -> Path:
    """One picture of 20 x 10 pixels, categories 3 (cat) and 5 (dog)."""
    document = {
        "images": [{"id": 1, "file_name": "a.png", "height": 10, "width": 20}],
        "categories": [{"id": 5, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [{"id": index, "image_id": 1, **one} for index, one in enumerate(annotations, start=1)],
    }
    if files:
        Image.new("RGB", (20, 10)).save(folder / "a.png")
    path = folder / "train.json"
    path.write_text(json.dumps(document))
    return path


CAT = {"category_id": 3, "bbox": [2, 3, 4, 5], "segmentation": [[2, 3, 6, 3, 6, 8, 2, 8]]}


def test_boxes_become_corners_and_categories_become_labels_from_one(tmp_path: Path) -> None:
    dataset = load_coco(write(tmp_path, CAT))
    assert dataset.labels == ("cat", "dog")
    sample = dataset.samples[0]
    np.testing.assert_array_equal(sample.boxes, [[2, 3, 6, 8]])
    np.testing.assert_array_equal(sample.labels, [1])
    assert sample.read_pixels().shape == (10, 20, 3)


def test_polygons_and_both_kinds_of_rle_give_the_same_mask(tmp_path: Path) -> None:
    # Columns 2 to 5, rows 3 to 7 of a picture 10 high: 23 zeros, then four columns of 5 with 5 zeros between.
    counts = [23, 5, 5, 5, 5, 5, 5, 5, 10 * 20 - 58]
    rle = {**CAT, "segmentation": {"size": [10, 20], "counts": counts}}
    polygon, listed = load_coco(write(tmp_path, CAT, rle)).samples[0].read_masks()
    for mask in (polygon, listed):
        assert (mask.x, mask.y, mask.bitmap.shape) == (2, 3, (5, 4))
        assert mask.bitmap.all()


def test_crowd_regions_are_no_objects(tmp_path: Path) -> None:
    crowd = {**CAT, "iscrowd": 1, "segmentation": {"size": [10, 20], "counts": [0, 200]}}
    assert len(load_coco(write(tmp_path, CAT, crowd), masks="required").samples[0].labels) == 1


def test_every_bad_annotation_is_named_in_one_report(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        CAT,
        {**CAT, "bbox": [15, 0, 10, 5]},
        {**CAT, "bbox": [1, 1, 0, 5]},
        {**CAT, "category_id": 9},
        {**CAT, "image_id": 4},
        {**CAT, "segmentation": []},
        {**CAT, "bbox": "wide"},
        {**CAT, "bbox": [float("nan"), 5, 1, 1]},
        {**CAT, "segmentation": {"size": [10, 20], "counts": "garbage"}},
    )
    with pytest.raises(DatasetError) as caught:
        load_coco(path, masks="required")
    report = str(caught.value)
    assert "8 problem(s)" in report
    for words in (
        "annotation 2: box [15, 0, 10, 5] reaches outside its image of 20 x 10",
        "annotation 3: expected a box with area, got 0 x 5",
        "annotation 4: unknown category_id 9",
        "annotation 5: unknown image_id 4",
        "annotation 6: expected a segmentation",
        "annotation 7: expected bbox [x, y, width, height] of finite numbers, got wide",
        "annotation 8: expected bbox [x, y, width, height] of finite numbers, got [NaN, 5, 1, 1]",
        "annotation 9: expected COCO's run lengths in 'counts', got some that do not decode",
    ):
        assert words in report


def test_bad_annotations_can_be_dropped(tmp_path: Path) -> None:
    path = write(tmp_path, CAT, {**CAT, "category_id": 9})
    assert len(load_coco(path, drop_bad=True).samples[0].labels) == 1


def test_a_missing_picture_is_named_even_when_bad_annotations_are_dropped(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"image 1: no file a\.png"):
        load_coco(write(tmp_path, CAT, files=False), drop_bad=True)


def test_labels_that_do_not_fit_the_categories_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        load_coco(write(tmp_path, CAT, {**CAT, "category_id": 5}), labels=("cat", "horse"))
    assert (
        "category 'dog' is not among the labels: cat, horse; train, evaluate and data leave others out with --labels"
        in str(caught.value)
    )
    assert "label 'horse' is not among the categories: cat, dog" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "expected JSON"), ("[]", "expected COCO's keys"), ('{"images": []}', "annotations")]
)
def test_a_file_that_is_no_coco_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(DatasetError, match=words):
        load_coco(path)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("images", [], "expected at least one image, got none"),
        (
            "images",
            [{"id": 1, "file_name": "a.png", "width": 20}],
            "image 1: expected width and height in pixels, got 20 and None",
        ),
        ("images", [{"id": 1, "height": 10, "width": 20}], r"images\[0\]: expected id and file_name"),
        ("categories", [{"id": 1}], r"categories\[0\]: expected id and name"),
    ],
)
def test_what_an_image_or_a_category_lacks_is_named(tmp_path: Path, key: str, value: object, words: str) -> None:
    path = write(tmp_path, CAT)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DatasetError, match=words):
        load_coco(path)


def test_pictures_are_decoded_as_the_server_decodes_them(tmp_path: Path) -> None:
    """16-bit grey is scaled, where Pillow's own conversion would turn it white."""
    path = write(tmp_path, CAT)
    Image.fromarray(np.full((10, 20), 32768, np.uint16)).save(tmp_path / "a.png")
    assert set(load_coco(path).samples[0].read_pixels().ravel()) <= {127, 128}


def test_a_picture_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, CAT)
    Image.new("RGB", (21, 10)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"image 1 \(a\.png\): expected a picture of 20 x 10, got 21 x 10"):
        load_coco(path)


def test_a_picture_that_changes_after_the_check_is_named_when_read(tmp_path: Path) -> None:
    dataset = load_coco(write(tmp_path, CAT))
    Image.new("RGB", (21, 10)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"\(10, 20\), got \(10, 21\)"):
        dataset.samples[0].read_pixels()
