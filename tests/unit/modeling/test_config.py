from __future__ import annotations

import pytest
from pydantic import ValidationError

from service.modeling.config import AnchorsConfig, BackboneConfig, ModelConfig, RoIConfig, TransformConfig


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


def network(architecture: str, name: str, **tables: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {"architecture": architecture, "labels": ["cell"], "backbone": {"name": name}, **tables}
    )


@pytest.mark.parametrize(
    ("architecture", "backbone", "tables", "key"),
    [
        ("faster_rcnn", "vgg16", {"backbone": {"name": "vgg16", "out_channels": 8}}, "backbone.out_channels"),
        ("faster_rcnn", "vgg16", {"backbone": {"name": "vgg16", "norm": "batch_norm"}}, "backbone.norm"),
        ("faster_rcnn", "resnet50_c4", {"roi": {"box_head_channels": 512}}, "roi.box_head_channels"),
        ("faster_rcnn", "resnet50_fpn", {"roi": {"mask_output_size": 28}}, "roi.mask_output_size"),
        ("faster_rcnn", "resnet50_fpn", {"roi": {"head_norm": "batch_norm"}}, "roi.head_norm"),
        ("faster_rcnn", "resnet50_fpn", {"roi": {"crop_size": 128}}, "roi.crop_size"),
        ("faster_rcnn", "resnet50_fpn", {"proposals": {"source": "caller"}}, "proposals.source"),
        ("fast_rcnn", "resnet50_fpn", {"rpn": {"nms_thresh": 0.5}}, "rpn.nms_thresh"),
        ("rcnn", "resnet50_c5", {"anchors": {"sizes": [[8]]}}, "anchors.sizes"),
        ("rcnn", "resnet50_c5", {"roi": {"sampling_ratio": 1}}, "roi.sampling_ratio"),
        ("rcnn", "resnet50_c4", {"roi": {"box_output_size": 3}}, "roi.box_output_size"),
    ],
)
def test_a_key_that_would_not_be_used_is_refused(
    architecture: str, backbone: str, tables: dict[str, object], key: str
) -> None:
    with pytest.raises(ValidationError, match=f"'{key}' would not be used, as "):
        network(architecture, backbone, **tables)


@pytest.mark.parametrize("backbone", ["vgg16", "resnet50_c4", "resnet50_c5"])
@pytest.mark.parametrize("architecture", ["faster_rcnn", "mask_rcnn", "fast_rcnn", "rcnn"])
def test_a_configuration_with_every_key_written_out_is_itself_again(architecture: str, backbone: str) -> None:
    config = network(architecture, backbone)
    assert ModelConfig.model_validate(config.model_dump()) == config


def test_numbers_that_are_not_written_are_the_papers() -> None:
    vgg16, c4, fpn = (network("faster_rcnn", name) for name in ("vgg16", "resnet50_c4", "resnet50_fpn"))
    assert (vgg16.transform.min_size, vgg16.transform.max_size) == (600, 1000)
    assert list(vgg16.anchors.sizes) == [(128, 256, 512)]
    for one in (vgg16, c4):
        assert (one.rpn.pre_nms_top_n_train, one.rpn.post_nms_top_n_train) == (12_000, 2000)
        assert (one.rpn.pre_nms_top_n_test, one.rpn.post_nms_top_n_test) == (6000, 300)
    assert (fpn.rpn.pre_nms_top_n_train, fpn.rpn.post_nms_top_n_train) == (2000, 2000)
    assert (fpn.rpn.pre_nms_top_n_test, fpn.rpn.post_nms_top_n_test) == (1000, 1000)
    for one in (vgg16, c4, fpn):
        rpn = one.rpn
        assert (rpn.batch_size_per_image, rpn.fg_iou_thresh, rpn.bg_iou_thresh, rpn.nms_thresh) == (256, 0.7, 0.3, 0.7)
        assert (one.roi.fg_iou_thresh, one.roi.positive_fraction) == (0.5, 0.25)
    assert [one.roi.batch_size_per_image for one in (vgg16, c4, fpn)] == [128, 64, 512]
    assert (vgg16.roi.box_head_channels, vgg16.roi.box_head_dropout) == (4096, 0.5)
    assert network("mask_rcnn", "resnet50_c4").roi.mask_head_channels == (256,)
    assert network("mask_rcnn", "resnet50_c4").roi.box_output_size == 14


def test_rcnn_has_its_papers_crops_and_fast_rcnn_its_rois() -> None:
    roi = network("rcnn", "vgg16").roi
    assert (roi.op, roi.crop_size, roi.crop_padding) == ("crop", 227, 16)
    assert network("fast_rcnn", "vgg16").roi.batch_size_per_image == 64


def test_what_is_written_goes_before_the_papers_numbers_in_documents_and_in_python() -> None:
    written = {"transform": {"min_size": 320}, "roi": {"box_head_convs": [8]}}
    from_toml = network("faster_rcnn", "vgg16", **written)
    assert (from_toml.transform.min_size, from_toml.transform.max_size) == (320, 1000)
    assert (from_toml.roi.box_head_channels, from_toml.roi.box_head_dropout) == (1024, 0)
    in_python = network("faster_rcnn", "vgg16", transform=TransformConfig(min_size=320))
    assert in_python.transform == from_toml.transform


def test_an_unknown_backbone_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValidationError, match=r"or timm/<model>, got 'resnt50_fpn'; did you mean 'resnet50_fpn'\?"):
        network("faster_rcnn", "resnt50_fpn")


def test_context_leaves_room_for_the_box() -> None:
    with pytest.raises(ValidationError, match="crop_padding below half of crop_size, got 32 and 64"):
        network("rcnn", "vgg16", roi={"crop_size": 64, "crop_padding": 32})


def test_a_hundred_thousand_labels_are_compared_once_each() -> None:
    """Counting each label among all others would take minutes; this stays within a test's time by counting once."""
    labels = tuple(f"label {number}" for number in range(100_000))
    backbone = BackboneConfig(name="resnet18_fpn")
    assert ModelConfig(architecture="faster_rcnn", labels=labels, backbone=backbone).num_classes == 100_001
    with pytest.raises(ValidationError, match="got twice: label 7"):
        ModelConfig(architecture="faster_rcnn", labels=(*labels, "label 7"), backbone=backbone)


@pytest.mark.parametrize(
    "anchors",
    [
        {"aspect_ratios": [1.0] * 1_000_000},
        {"sizes": [[32.0] * 1_000_000]},
        {"sizes": [[32.0]] * 1_000_000},
        {"aspect_ratios": [float("inf")]},
        {"sizes": [[1e300]]},
    ],
)
def test_anchors_beyond_any_sense_are_refused_by_the_configuration(anchors: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        AnchorsConfig.model_validate(anchors)
