"""mmdetection's checkpoints. What it computes is detectron2's: the reference is the same, with the weights under
detectron2's names and mmdetection's own mean, deviation and place of the stride.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.model_store.importing import ImportedModel, import_checkpoint
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from tests.random_detectors import blobs, enliven
from tests.unit.model_store.detectron2_reference import detectron2_answer
from tests.unit.model_store.test_detectron2_layout import answer, as_detectron2, assert_agree, network_of

CLASSES = ("a", "b", "c")
# Our names and mmdetection's, part by part.
NAMES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_head.bbox_head.fc_cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_head.bbox_head.fc_reg."),
    (r"^roi_heads\.mask_head\.(\d)\.0\.", r"roi_head.mask_head.convs.\1.conv."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "roi_head.mask_head.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "roi_head.mask_head.conv_logits."),
)
V2_CONFIG = """
img_norm_cfg = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False, transforms=[dict(type='Normalize')])]
model = dict(
    type='FasterRCNN',
    backbone=dict(type='ResNet', depth=50, norm_cfg=dict(type='BN', requires_grad=False), style='caffe'),
    rpn_head=dict(anchor_generator=dict(
        type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64])),
    roi_head=dict(bbox_head=dict(bbox_coder=dict(target_stds=[0.05, 0.05, 0.1, 0.1]))),
    test_cfg=dict(rpn=dict(nms_pre=2000, max_per_img=500, nms=dict(type='nms', iou_threshold=0.6)),
                  rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.4), max_per_img=50)))
"""
V3_CONFIG = """
model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375],
                           bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(depth=50, style='pytorch', type='ResNet'))
test_pipeline = [dict(type='Resize', scale=(1333, 800), keep_ratio=True)]
"""


def as_mmdetection(state_dict: dict[str, Tensor], *, is_bgr: bool) -> dict[str, Tensor]:
    """The state dict as mmdetection would have saved the same network."""
    renamed = {}
    for key, tensor in state_dict.items():
        name = key
        for ours, theirs in NAMES:
            name = re.sub(ours, theirs, name)
        if key.startswith("roi_heads.box_predictor.cls_score"):
            tensor = torch.cat([tensor[1:], tensor[:1]])
        if key.startswith("roi_heads.box_predictor.bbox_pred"):
            tensor = tensor[4:]
        if key.startswith("roi_heads.mask_predictor.mask_fcn_logits"):
            tensor = tensor[1:]
        renamed[name] = tensor
    if is_bgr:
        renamed["backbone.conv1.weight"] = renamed["backbone.conv1.weight"][:, [2, 1, 0]]
    return renamed


def network(architecture: str, *, is_caffe: bool, name: str = "resnet50_fpn") -> ModelConfig:
    """mmdetection's base configurations, said in our words."""
    mean = (123.675 / 255, 116.28 / 255, 103.53 / 255)
    std = (1 / 255,) * 3 if is_caffe else (58.395 / 255, 57.12 / 255, 57.375 / 255)
    document: dict[str, Any] = {
        "architecture": architecture,
        "labels": CLASSES,
        "backbone": {"name": name, "stride_in_1x1": is_caffe, "norm": "batch_norm"},
        "transform": {"mean": mean, "std": std},
        "anchors": {"style": "mmdetection"},
        "roi": {"sampling_ratio": 0, "aligned": True, "box_head_channels": 64},
    }
    return ModelConfig.model_validate(document)


@pytest.mark.parametrize(
    ("architecture", "is_caffe", "name"),
    [
        ("mask_rcnn", False, "resnet50_fpn"),
        ("faster_rcnn", True, "resnet50_fpn"),
    ],
)
def test_a_checkpoint_answers_as_mmdetection(architecture: str, is_caffe: bool, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "latest.pth"
    config = network(architecture, is_caffe=is_caffe, name=name)
    image = torch.from_numpy(blobs(64, 96))
    ours = network_of(ImportedModel(config, build_model(config).state_dict()), image)
    enliven(ours, lambda: answer(ours, image))
    state_dict = ours.state_dict()
    torch.save({"meta": {"CLASSES": CLASSES}, "state_dict": as_mmdetection(state_dict, is_bgr=is_caffe)}, path)
    imported = import_checkpoint(path, input_format="bgr" if is_caffe else None)
    assert imported.config.labels == CLASSES
    assert imported.config.backbone == config.backbone
    assert imported.config.anchors == config.anchors
    assert imported.config.roi == config.roi
    assert imported.config.transform.mean == pytest.approx(config.transform.mean)
    with torch.no_grad():
        reference = detectron2_answer(
            as_detectron2(state_dict),
            image.flip(2).permute(2, 0, 1).float(),
            std=[255 * one for one in config.transform.std][::-1],
            stride_in_1x1=is_caffe,
        )
    assert_agree(answer(network_of(imported, image), image), reference)


def shapes_of(config: ModelConfig) -> dict[str, Tensor]:
    """Weights that take no room in the file."""
    with torch.device("meta"):
        shapes = {key: one.shape for key, one in build_model(config).state_dict().items()}
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def test_what_the_configuration_in_the_file_says_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "epoch_12.pth"
    weights = as_mmdetection(shapes_of(network("faster_rcnn", is_caffe=True)), is_bgr=True)
    torch.save({"meta": {"CLASSES": CLASSES, "config": V2_CONFIG, "epoch": 12}, "state_dict": weights}, path)
    imported = import_checkpoint(path)
    config = imported.config
    assert config.backbone.stride_in_1x1
    assert config.transform.mean == pytest.approx((123.675 / 255, 116.28 / 255, 103.53 / 255))
    assert config.transform.std == pytest.approx((1 / 255,) * 3)
    assert (config.transform.min_size, config.transform.max_size) == (600, 1000)
    assert [list(level) for level in config.anchors.sizes] == [[16], [32], [64], [128], [256]]
    assert config.roi.box_weights == pytest.approx((20, 20, 10, 10))
    assert (config.rpn.pre_nms_top_n_test, config.rpn.post_nms_top_n_test, config.rpn.nms_thresh) == (2000, 500, 0.6)
    detections = config.detections
    assert (detections.score_thresh, detections.nms_thresh, detections.detections_per_img) == (0.1, 0.4, 50)
    told = {key: source for key, _, source in imported.rows}
    assert told["anchors.sizes"] == "the file: its configuration"


def test_the_third_release_says_it_in_other_words(tmp_path: Path) -> None:
    path = tmp_path / "epoch_12.pth"
    weights = as_mmdetection(shapes_of(network("mask_rcnn", is_caffe=False)), is_bgr=False)
    meta = {"dataset_meta": {"classes": CLASSES, "palette": [(1, 2, 3)]}, "cfg": V3_CONFIG}
    torch.save({"meta": meta, "state_dict": weights, "message_hub": {}}, path)
    config = import_checkpoint(path).config
    assert config.labels == CLASSES
    assert not config.backbone.stride_in_1x1
    assert config.transform.std == pytest.approx((0.229, 0.224, 0.225))
    assert (config.transform.min_size, config.transform.max_size) == (800, 1333)


@pytest.mark.parametrize(
    "text",
    [
        "model = (",
        "model = __import__('os').system('true')",
        "a = []\n" + "b = [a, a]\na = [b, b]\n" * 60,
        "(" * 100_000,
    ],
)
def test_a_configuration_that_is_none_changes_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "latest.pth"
    weights = as_mmdetection(shapes_of(network("faster_rcnn", is_caffe=False)), is_bgr=False)
    torch.save({"meta": {"CLASSES": CLASSES, "config": text}, "state_dict": weights}, path)
    assert import_checkpoint(path).config.transform.min_size == 800


def test_the_first_release_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save(
        {"state_dict": {"bbox_head.fc_cls.weight": torch.zeros(4, 2), "backbone.conv1.weight": torch.zeros(1)}}, path
    )
    with pytest.raises(ModelStoreError, match=r"got one of mmdetection 1, .*upgrade_model_version\.py"):
        import_checkpoint(path, labels=CLASSES)
