"""Check that an imported network gives the same results as its source: match the source's own detections in one picture
with ours.

Shapes: E expected detections, D found ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from service.errors import ModelStoreError
from service.model_store.files import read_text
from service.model_store.importing import ImportedModel
from service.modeling.build import build_model
from service.modeling.roi_heads import Selection
from service.structures import UInt8Array

MIN_IOU = 0.9
"""Minimum overlap for two boxes to count as the same detection: mmdetection resizes pictures with another filter."""
MAX_SCORE_DIFFERENCE = 0.05
MIN_SHARE = 0.95
"""The share of the detections on each side that must have a match on the other."""
# By the key of the boxes: the key of the labels, and the number of the first label (1 for torchvision, else 0).
_WRITERS = {"boxes": ("labels", 1), "pred_boxes": ("pred_classes", 0), "bboxes": ("labels", 0)}

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The detections of a picture.

    Attributes:
        boxes: (D, 4) as (x1, y1, x2, y2) in pixels of the picture.
        labels: (D,) from 1.
        scores: (D,) 0 to 1.
    """

    boxes: Array
    labels: NDArray[np.int64]
    scores: Array


@dataclass(frozen=True, slots=True)
class Comparison:
    """How well two sets of detections agree.

    Attributes:
        expected: number of detections of the source.
        found: number of our detections.
        matched: number of pairs with the same label whose boxes overlap by `MIN_IOU` or more and whose scores differ by
            `MAX_SCORE_DIFFERENCE` or less.
        lowest_iou: of the matched ones; 1 if there are none.
        largest_score_difference: of the matched ones; 0 if there are none.
    """

    expected: int
    found: int
    matched: int
    lowest_iou: float
    largest_score_difference: float

    @property
    def agrees(self) -> bool:
        """Whether the imported network gives the same results. False if the source found nothing."""
        return self.expected > 0 and self.matched >= MIN_SHARE * max(self.expected, self.found)


def read_answer(path: Path) -> Answer:
    """Read the detections found by the source's own code.

    Args:
        path: JSON with `boxes`, `labels` and `scores` like torchvision, with `boxes` and `classes` or `pred_boxes` and
            `pred_classes` like detectron2, or with `bboxes`, `labels` and `scores` like mmdetection; labels count from
            1 in the first form and from 0 in the others.

    Raises:
        ModelStoreError: not readable, or in another format.
    """
    try:
        document = json.loads(read_text(path))
        if isinstance(document, list) and len(document) == 1:
            document = document[0]
        return _answer_of(document)
    except (ValueError, TypeError, KeyError, StopIteration, OverflowError, RecursionError) as error:
        raise ModelStoreError(
            f"{path}: expected detections as JSON, {{'boxes': [[x1, y1, x2, y2], …], 'labels': […], 'scores': […]}}, "
            f"got something else ({type(error).__name__})"
        ) from error


def _answer_of(document: Mapping[str, Any]) -> Answer:
    key = next(one for one in ("pred_boxes", "bboxes", "boxes") if one in document)
    label_key, first = _WRITERS[key]
    if "classes" in document:
        label_key, first = "classes", 0
    boxes = np.asarray(document[key], np.float64).reshape(-1, 4)
    labels = np.asarray(document[label_key], np.int64).reshape(-1) + (1 - first)
    scores = np.asarray(document["scores"], np.float64).reshape(-1)
    if not len(boxes) == len(labels) == len(scores) or not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
        raise ValueError("lengths")
    return Answer(boxes, labels, scores)


def answer_of(imported: ImportedModel, pixels: UInt8Array) -> Answer:
    """The imported network's detections, run by PyTorch on the CPU with its own thresholds.

    Args:
        pixels: (H, W, 3) RGB.

    Raises:
        ModelStoreError: the network has no RPN, so it finds nothing by itself.
    """
    config = imported.config
    if not config.has_rpn:
        raise ModelStoreError(f"expected a network that proposes boxes itself, got a {config.architecture}")
    network = build_model(config).eval()
    network.load_state_dict(imported.state_dict)
    selection = Selection(config.detections.score_thresh, config.detections.detections_per_img)
    [found] = network.detect([torch.from_numpy(pixels)], [selection], with_masks=[False], proposals=[None])
    return Answer(found.boxes.double().numpy(), found.labels.numpy(), found.scores.double().numpy())


def compare(expected: Answer, found: Answer) -> Comparison:
    """Match each expected detection, best score first, with the unmatched detection of its label that overlaps most."""
    free = np.ones(len(found.boxes), bool)
    overlaps: list[float] = []
    differences: list[float] = []
    for index in np.argsort(-expected.scores, kind="stable"):
        differs = np.abs(found.scores - expected.scores[index])
        fits = free & (found.labels == expected.labels[index]) & (differs <= MAX_SCORE_DIFFERENCE)
        iou = np.where(fits, _iou(expected.boxes[index], found.boxes), 0)
        best = int(iou.argmax()) if len(iou) else 0
        if len(iou) and iou[best] >= MIN_IOU:
            free[best] = False
            overlaps.append(float(iou[best]))
            differences.append(float(differs[best]))
    return Comparison(
        expected=len(expected.boxes),
        found=len(found.boxes),
        matched=len(overlaps),
        lowest_iou=min(overlaps, default=1.0),
        largest_score_difference=max(differences, default=0.0),
    )


def _iou(box: Array, boxes: Array) -> Array:
    """(4,) and (D, 4) -> (D,)."""
    corners = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    shared = np.clip(corners[1] - corners[0], 0, None).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    ratio: Array = shared / np.maximum(areas - shared, 1e-9)
    return ratio


def told(comparison: Comparison) -> Sequence[str]:
    """The comparison as lines of text, with hints if the two do not agree."""
    lines = [
        f"{comparison.matched} of {comparison.expected} expected detections found, {comparison.found} found in all; "
        f"lowest IoU of the matched {comparison.lowest_iou:.3f}, largest difference of scores "
        f"{comparison.largest_score_difference:.2g}"
    ]
    if comparison.expected == 0:
        lines.append("the expected answer has no detections, which proves nothing: take a picture with some")
    elif not comparison.agrees:
        lines.append(
            "the import does not answer as its source: see below what was assumed, and give a --model-config with "
            "what differs (anchors, mean and std, image size, thresholds, norm_eps, stride_in_1x1), or --input-format"
        )
    return lines
