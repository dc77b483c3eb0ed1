"""Our predictor gives torchvision's own detections for the same weights: the promise that the product is sold by."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torchvision.models import detection
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from service.inference.predictor import Predictor
from service.masks.rle import encode_rle
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.structures import Detections, DetectOptions, Image, Query
from service.training.loop import evaluation_info

Numbers = NDArray[Any]
LABELS = [f"class {index}" for index in range(1, 91)]
MOBILE_320: dict[str, Any] = {
    "transform": {"min_size": 320, "max_size": 640},
    "anchors": {"sizes": [[32, 64, 128, 256, 512]] * 3},
    "rpn": {"pre_nms_top_n_test": 150, "post_nms_top_n_test": 150, "score_thresh": 0.05},
}
SMALLER = {
    "transform": {"min_size": 192, "max_size": 320}
}  # the same network on fewer pixels: two cores run these tests
BUILDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fasterrcnn_resnet50_fpn": ("faster_rcnn", "resnet50_fpn", SMALLER),
    "maskrcnn_resnet50_fpn": ("mask_rcnn", "resnet50_fpn", SMALLER),
    "fasterrcnn_mobilenet_v3_large_320_fpn": ("faster_rcnn", "mobilenet_v3_large_fpn", MOBILE_320),
}


def picture(height: int, width: int, *, seed: int = 0) -> Image:
    """Soft random blobs: random weights find more to tell apart in them than in noise."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((1, 3, 8, 10), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return Image(np.ascontiguousarray((smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8)))


@cache
def pair(builder: str) -> tuple[GeneralizedRCNN, Predictor]:
    """torchvision's model with random weights, and our predictor with the same ones."""
    architecture, backbone, tables = BUILDERS[builder]
    torch.manual_seed(1)
    score_thresh = 0.02
    sizes = tables["transform"] if tables is SMALLER else {}
    theirs = getattr(detection, builder)(
        weights=None, weights_backbone=None, num_classes=91, box_score_thresh=score_thresh, **sizes
    ).eval()
    _condition(theirs)
    config = ModelConfig.model_validate(
        {
            "architecture": architecture,
            "labels": LABELS,
            "backbone": {"name": backbone, "norm": "batch_norm"},
            "detections": {"score_thresh": score_thresh},
            **tables,
        }
    )
    ours = build_model(config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, Predictor(ours, info=evaluation_info(config), device=torch.device("cpu"))


def _condition(model: GeneralizedRCNN) -> None:
    """Make random weights behave as trained ones do: activations of order 1, some anchors and classes surer.

    As they are drawn, activations grow to thousands through the trunk, and float32's last digits with them; and all
    anchors and classes score alike, so that rounding alone decides which comes first.
    """
    model.backbone.train()
    with torch.no_grad():
        for norm in model.backbone.modules():
            if isinstance(norm, torch.nn.BatchNorm2d):
                norm.momentum = None  # a plain average over what comes
        model.backbone(torch.randn(8, 3, 256, 256, generator=torch.Generator().manual_seed(0)))
        model.eval()
        spreads = {
            "rpn.head.cls_logits": 1.0,
            "rpn.head.bbox_pred": 0.05,
            "roi_heads.box_predictor.cls_score": 3.0,
            "roi_heads.box_predictor.bbox_pred": 0.3,
            "roi_heads.mask_predictor.mask_fcn_logits": 5.0,  # few probabilities at the threshold itself
        }
        layers = dict(model.named_modules())
        hooks = [
            layers[name].register_forward_hook(partial(_spread, to=spread))
            for name, spread in spreads.items()
            if name in layers
        ]
        model([torch.from_numpy(picture(256, 256).pixels).permute(2, 0, 1) / 255])
        for hook in hooks:
            hook.remove()


def _spread(layer: torch.nn.Module, args: object, output: torch.Tensor, *, to: float) -> torch.Tensor:
    assert isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    factor = to / output.std()
    layer.weight.mul_(factor)
    return output * factor


def reference(model: GeneralizedRCNN, image: Image) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found: dict[str, torch.Tensor] = model([torch.from_numpy(image.pixels).permute(2, 0, 1) / 255])[0]
    return found


def assert_same(ours: Detections, boxes: Numbers, labels: Numbers, scores: Numbers) -> None:
    """Equal as sets: two detections whose scores differ by less than rounding may come in either order."""
    assert len(ours) == len(boxes)
    np.testing.assert_allclose(ours.scores, scores, atol=1e-4)
    for box, label, score in zip(boxes, labels, scores, strict=True):
        near = (np.abs(ours.boxes - box).max(axis=1) <= 1e-3) & (ours.labels == label)
        assert near.any(), f"no box within 1e-3 px of {box}; nearest {np.abs(ours.boxes - box).max(axis=1).min()}"
        assert np.abs(ours.scores[near] - score).min() <= 1e-4


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("size", [(480, 640), (333, 250), (40, 150)])
def test_same_weights_give_torchvisions_boxes_labels_and_scores(builder: str, size: tuple[int, int]) -> None:
    theirs, ours = pair(builder)
    image = picture(*size)
    expected = reference(theirs, image)
    found = ours.predict([Query(image)])[0].detections
    assert len(found) >= 10
    assert_same(found, *(expected[key].numpy() for key in ("boxes", "labels", "scores")))


def test_same_weights_give_torchvisions_masks() -> None:
    theirs, ours = pair("maskrcnn_resnet50_fpn")
    image = picture(240, 320)
    expected = (reference(theirs, image)["masks"][:, 0] >= 0.5).numpy().astype(np.uint8)
    found = ours.predict([Query(image)])[0].detections
    assert found.masks is not None
    rles = encode_rle(found.masks, found.boxes, image.size)
    ious = [
        coco_mask.iou([rle], [coco_mask.encode(np.asfortranarray(mask))], [0])[0][0]
        for rle, mask in zip(rles, expected, strict=True)
        if mask.any()
    ]
    assert len(ious) >= 10
    assert min(ious) >= 0.999


@pytest.mark.parametrize("builder", ["maskrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_320_fpn"])
def test_an_image_gets_the_same_answer_alone_and_among_seven_others(builder: str) -> None:
    _, ours = pair(builder)
    queries = [Query(picture(240, 320, seed=seed), DetectOptions(max_detections=20)) for seed in range(8)]
    together = ours.predict(queries)
    assert {prediction.batch_size for prediction in together} == {8}
    for query, prediction in zip(queries[::3], together[::3], strict=True):
        alone, among = ours.predict([query])[0].detections, prediction.detections
        assert_same(among, alone.boxes, alone.labels, alone.scores)
        if alone.masks is not None and among.masks is not None:
            np.testing.assert_allclose(among.masks, alone.masks, atol=1e-4)


def test_images_of_several_sizes_in_one_batch_are_answered_as_torchvision_answers_them_together() -> None:
    theirs, ours = pair("fasterrcnn_resnet50_fpn")
    images = [picture(240, 320), picture(320, 240, seed=1), picture(100, 300, seed=2)]
    with torch.inference_mode():
        expected = theirs([torch.from_numpy(image.pixels).permute(2, 0, 1) / 255 for image in images])
    for one, prediction in zip(expected, ours.predict([Query(image) for image in images]), strict=True):
        assert prediction.padding_ratio > 0.2
        assert_same(prediction.detections, *(one[key].numpy() for key in ("boxes", "labels", "scores")))


def test_options_select_what_the_full_answer_holds() -> None:
    _, ours = pair("fasterrcnn_resnet50_fpn")
    image = picture(240, 320)
    full = ours.predict([Query(image)])[0].detections
    label, thresh = int(full.labels[3]), float(full.scores[5])
    queries = [
        Query(image, DetectOptions(max_detections=4)),
        Query(image, DetectOptions(score_thresh=thresh)),
        Query(image, DetectOptions(label_ids=frozenset({label}))),
    ]
    first, sure, one_label = (prediction.detections for prediction in ours.predict(queries))
    assert_same(first, full.boxes[:4], full.labels[:4], full.scores[:4])
    np.testing.assert_array_equal(sure.scores > thresh, True)
    assert len(sure) == int((full.scores > thresh).sum())
    assert set(one_label.labels) == {label}
    assert len(one_label) >= int((full.labels == label).sum()) >= 1


def test_masks_are_computed_for_nobody_who_did_not_ask() -> None:
    _, ours = pair("maskrcnn_resnet50_fpn")
    image = picture(240, 320)
    boxes_seen: list[int] = []
    hook = ours._model.roi_heads.mask_head.register_forward_pre_hook(
        lambda module, args: boxes_seen.append(len(args[0]))
    )
    try:
        without, asked = ours.predict(
            [Query(image, DetectOptions(with_masks=False)), Query(image, DetectOptions(max_detections=3))]
        )
        assert boxes_seen == [3]
        ours.predict([Query(image, DetectOptions(with_masks=False))])
        assert boxes_seen == [3]
    finally:
        hook.remove()
    assert without.detections.masks is None
    assert asked.detections.masks is not None
    assert asked.detections.masks.shape == (3, 28, 28)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (7, 3)])
def test_tiny_images_are_answered(size: tuple[int, int]) -> None:
    _, ours = pair("maskrcnn_resnet50_fpn")
    found = ours.predict([Query(picture(*size), DetectOptions(score_thresh=0.0))])[0].detections
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, 2:] <= np.array(size[::-1]) + 1e-4).all()
