"""What the benchmarks run: networks that find enough to be measured, twice with the same weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection import roi_heads, rpn
from torchvision.ops import MultiScaleRoIAlign

from benchmarks._detectors import (
    as_image,
    bundled_models,
    example_picture,
    our_predictor,
    random_detector,
    store_detector,
    torchvision_input,
    torchvision_twin,
)
from service.structures import Query

MOBILE = "fasterrcnn_mobilenet_v3_large_320_fpn"


def test_random_detector_finds_as_much_as_it_may_and_ours_the_same(tmp_path: Path) -> None:
    image = as_image(example_picture(320, 240))
    theirs = random_detector(MOBILE, image)
    predictor = our_predictor(store_detector(theirs, MOBILE, tmp_path), "eager")
    with torch.inference_mode():
        [reference] = theirs([torchvision_input(image)])
    [prediction] = predictor.predict([Query(image)])
    assert len(reference["boxes"]) == len(prediction.detections) == 100
    np.testing.assert_allclose(prediction.detections.scores, reference["scores"].numpy(), atol=1e-4)


def test_torchvision_twin_runs_torchvisions_own_code() -> None:
    for stored in bundled_models():
        twin = torchvision_twin(stored)
        assert isinstance(twin.roi_heads.box_roi_pool, MultiScaleRoIAlign)
        assert type(twin.roi_heads).forward is roi_heads.RoIHeads.forward
        assert type(twin.rpn).forward is rpn.RegionProposalNetwork.forward
