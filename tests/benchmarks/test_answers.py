"""The two services that are timed against each other say the same, or the comparison would mean nothing."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco

from benchmarks._answers import OurService, StraightforwardService
from benchmarks._detectors import as_jpeg, bundled_models, example_picture, our_predictor, picture_for, torchvision_twin
from service.model_store.store import StoredModel


def detections(answer: bytes) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(answer)["detections"]
    return found


@pytest.mark.parametrize("stored", bundled_models(), ids=lambda stored: stored.name)
def test_both_services_find_the_same(stored: StoredModel) -> None:
    jpegs = [as_jpeg(example_picture(*size, name=picture_for(stored.name))) for size in ((240, 200), (200, 240))]
    ours = OurService(our_predictor(stored, "eager")).answer(jpegs)
    straightforward = StraightforwardService(torchvision_twin(stored), stored.model_toml.labels)
    # One by one: in a batch torchvision pads the pictures to each other, which changes what it finds.
    theirs = [answer for jpeg in jpegs for answer in straightforward.answer([jpeg])]
    assert any(map(detections, ours))
    for mine, reference in zip(map(detections, ours), map(detections, theirs), strict=True):
        assert [one["label"] for one in mine] == [one["label"] for one in reference]
        np.testing.assert_allclose([one["box"] for one in mine], [one["box"] for one in reference], atol=0.02)
        if stored.model_toml.has_masks:
            pairs = zip(mine, reference, strict=True)
            assert min(float(coco.iou([a["mask"]], [b["mask"]], [0])[0, 0]) for a, b in pairs) > 0.99


def test_answers_come_in_the_order_of_the_pictures_though_sizes_share_batches() -> None:
    [stored, *_] = bundled_models()
    service = OurService(our_predictor(stored, "eager"))
    sizes = [(240, 200), (200, 240), (240, 200)]
    answers = [json.loads(one) for one in service.answer([as_jpeg(example_picture(*size)) for size in sizes])]
    assert [(one["image"]["width"], one["image"]["height"]) for one in answers] == sizes
    assert [one["batch_size"] for one in answers] == [2, 1, 2]
