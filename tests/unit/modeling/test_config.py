from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.modeling.config import ModelConfig, RoIConfig


def test_the_mask_branch_differs_from_the_box_branch_as_far_as_it_says() -> None:
    roi = RoIConfig.model_validate({"op": "roi_warp", "aligned": True, "mask": {"op": "roi_align_max"}})
    mask = roi.mask_branch()
    assert (roi.op, mask.op) == ("roi_warp", "roi_align_max")
    assert (mask.sampling_ratio, mask.aligned) == (2, True)


@pytest.mark.parametrize(
    ("roi", "key"),
    [
        ({"op": "roi_warp", "sampling_ratio": 0}, "sampling_ratio"),
        ({"sampling_ratio": 0, "mask": {"op": "roi_warp"}}, r"mask\.sampling_ratio"),
        ({"op": "roi_warp", "mask": {"sampling_ratio": 0}}, r"mask\.sampling_ratio"),
    ],
)
def test_warping_refuses_to_adapt_its_points_in_either_branch(roi: dict[str, object], key: str) -> None:
    with pytest.raises(ValidationError, match=f"expected {key} of 1 or more for roi_warp"):
        RoIConfig.model_validate(roi)


def test_operators_that_can_adapt_do() -> None:
    roi = RoIConfig.model_validate({"op": "roi_align_max", "sampling_ratio": 0, "mask": {"op": "roi_pool"}})
    assert roi.mask_branch().sampling_ratio == 0


def test_a_spatial_pyramid_cannot_stand_before_convolutions() -> None:
    with pytest.raises(ValidationError, match="expected op to be one of roi_pool, roi_align, roi_align_max, roi_warp"):
        RoIConfig(op="spp", box_head_convs=(256,))


def test_masks_need_a_square_patch_beside_a_spatial_pyramid() -> None:
    document = {"architecture": "mask_rcnn", "labels": ["cell"], "backbone": {"name": "resnet18_fpn"}}
    with pytest.raises(ValidationError, match=r"expected roi\.mask\.op to be one of roi_pool, .*, roi_warp beside"):
        ModelConfig.model_validate({**document, "roi": {"op": "spp"}})
    with pytest.raises(ValidationError, match="should be 'roi_pool', 'roi_align', 'roi_align_max' or 'roi_warp'"):
        ModelConfig.model_validate({**document, "roi": {"mask": {"op": "spp"}}})
    config = ModelConfig.model_validate({**document, "roi": {"op": "spp", "mask": {"op": "roi_align"}}})
    assert config.roi.mask_branch().op == "roi_align"
    boxes_only = ModelConfig.model_validate({**document, "architecture": "faster_rcnn", "roi": {"op": "spp"}})
    assert boxes_only.roi.box_bins == 21


@pytest.mark.parametrize(
    ("roi", "expected"),
    [
        ({"op": "spp"}, "roi.op to be one of roi_pool, roi_align, roi_align_max, roi_warp with resnet50_c4"),
        ({"box_head_convs": [8]}, "no roi.box_head_convs, roi.box_head_dropout or roi.head_norm with resnet50_c4"),
        ({"head_norm": "batch_norm"}, "no roi.box_head_convs, roi.box_head_dropout or roi.head_norm with resnet50_c4"),
        ({"mask_head_channels": [8, 8]}, "one number in roi.mask_head_channels with resnet50_c4"),
    ],
)
def test_res5_takes_a_square_patch_and_no_layers_beside_it(roi: dict[str, object], expected: str) -> None:
    document = {
        "architecture": "mask_rcnn",
        "labels": ["cell"],
        "backbone": {"name": "resnet50_c4"},
        "anchors": {"sizes": [[32, 64]]},
    }
    plain = {"mask_head_channels": [8], "mask": {"op": "roi_align"}}
    assert ModelConfig.model_validate({**document, "roi": plain}).backbone.has_res5_head
    with pytest.raises(ValidationError, match=f"expected {expected}"):
        ModelConfig.model_validate({**document, "roi": {**plain, **roi}})


def test_dropout_is_for_hidden_layers() -> None:
    with pytest.raises(ValidationError, match="'box_head_dropout' is for a box head of two hidden layers"):
        RoIConfig(box_head_dropout=0.5, box_head_convs=(8,))
