from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from service.training.matching import CompiledCOCOeval

IMAGES, LABELS = 4, 2


def indexed(annotations: list[dict[str, Any]]) -> COCO:
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number, "height": 200, "width": 200} for number in range(1, IMAGES + 1)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, LABELS + 1)],
        "annotations": [{"id": number, **one} for number, one in enumerate(annotations, start=1)],
    }
    coco.createIndex()
    return coco


def boxes(numbers: np.random.Generator, count: int, **more: Any) -> list[dict[str, Any]]:
    """Boxes of all of COCO's sizes; some lie over others, some are equal, and so are some scores. The last image and
    label have none.
    """
    found = []
    for _ in range(count):
        x, y = numbers.integers(0, 40, 2).tolist()
        width, height = numbers.choice([20, 30, 60, 120], 2).tolist()
        image, label = numbers.integers(1, IMAGES), numbers.integers(1, LABELS + 1)
        found.append(
            {
                "image_id": int(image),
                "category_id": int(label),
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "score": float(numbers.integers(1, 9)) / 8,
                **more,
            }
        )
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_detections", [100, 5])
def test_every_match_is_that_of_pycocotools(seed: int, max_detections: int) -> None:
    numbers = np.random.default_rng(seed)
    objects = boxes(numbers, 40) + boxes(numbers, 6, iscrowd=1)
    detections = boxes(numbers, 80)
    results = []
    for evaluation in (COCOeval, CompiledCOCOeval):
        with contextlib.redirect_stdout(io.StringIO()):
            run = evaluation(indexed(objects), indexed(detections), "bbox")
            run.params.maxDets = [max_detections]
            run.evaluate()
            run.accumulate()
        results.append(run)
    theirs, ours = results
    assert sum(one is not None for one in ours.evalImgs) > 20
    for expected, found in zip(theirs.evalImgs, ours.evalImgs, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key], value, err_msg=key)
    np.testing.assert_array_equal(ours.eval["precision"], theirs.eval["precision"])
    np.testing.assert_array_equal(ours.eval["recall"], theirs.eval["recall"])


@pytest.mark.parametrize(("objects", "detections"), [(0, 3), (3, 0)])
def test_objects_or_detections_alone_match_nothing(objects: int, detections: int) -> None:
    numbers = np.random.default_rng(0)
    with contextlib.redirect_stdout(io.StringIO()):
        run = CompiledCOCOeval(indexed(boxes(numbers, objects)), indexed(boxes(numbers, detections)), "bbox")
        run.evaluate()
    matches = [np.abs(one[key]).sum() for one in run.evalImgs if one is not None for key in ("dtMatches", "gtMatches")]
    assert len(matches) > 0
    assert sum(matches) == 0
