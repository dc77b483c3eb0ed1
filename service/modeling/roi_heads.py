"""RoI heads: classify and refine proposals, then predict masks. Training is torchvision's `forward`; serving calls the
steps apart, so that each request gets its own thresholds and nobody pays for masks that were not asked for.

Shapes: R proposals of the whole batch, D detections of one image, C classes with the background, M x M mask size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection import roi_heads
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from service.modeling.poolers import RoIPooler

MIN_BOX_SIDE = 1e-2
"""Pixels; smaller boxes are dropped, as torchvision does."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of one image's classified boxes are kept.

    Attributes:
        score_thresh: scores above this.
        detections_per_img: at most this many, best first.
        labels: only these class ids; None for all.
    """

    score_thresh: float
    detections_per_img: int
    labels: frozenset[int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BoxDetections:
    """One image's kept boxes on the device: (D, 4) in pixels of the resized image, (D,) int64, (D,)."""

    boxes: Tensor
    labels: Tensor
    scores: Tensor

    def none(self) -> BoxDetections:
        """The same image with nothing kept."""
        return BoxDetections(self.boxes[:0], self.labels[:0], self.scores[:0])


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's heads with the steps of inference exposed."""

    def detect_boxes(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        selections: Sequence[Selection],
        *,
        roi_op: str | None = None,
    ) -> list[BoxDetections]:
        """Classify and refine the proposals of each image, and keep what its selection asks for.

        Args:
            features: feature maps by name.
            proposals: (L, 4) for each image, in pixels of the resized image.
            image_sizes: each resized image's (height, width); boxes are clipped to it.
            selections: one for each image.
            roi_op: the operator instead of the configured one, with the same parameters.
        """
        box_features = self.box_head(_with_op(self.box_roi_pool, roi_op)(features, proposals, image_sizes))
        class_logits, box_regression = self.box_predictor(box_features)
        scores = class_logits.float().softmax(-1)
        # Where no image has a proposal, torchvision's coder leaves the classes' boxes in one row.
        boxes = self.box_coder.decode(box_regression.float(), proposals).reshape(*scores.shape, 4)
        counts = [len(one) for one in proposals]
        return [
            self._select(image_boxes, image_scores, image_size, selection)
            for image_boxes, image_scores, image_size, selection in zip(
                boxes.split(counts), scores.split(counts), image_sizes, selections, strict=True
            )
        ]

    def detect_masks(
        self,
        features: Mapping[str, Tensor],
        detections: Sequence[BoxDetections],
        image_sizes: Sequence[tuple[int, int]],
        *,
        roi_op: str | None = None,
    ) -> list[Tensor]:
        """Predict the mask of each detection: (D, M, M) probabilities of its own class, for each image."""
        boxes = [one.boxes for one in detections]
        labels = torch.cat([one.labels for one in detections])
        pooled = _with_op(self.mask_roi_pool, roi_op)(features, boxes, image_sizes)
        logits = self.mask_predictor(self.mask_head(pooled))
        own_class = logits[torch.arange(len(labels), device=labels.device), labels]
        return list(own_class.float().sigmoid().split([len(one) for one in boxes]))

    def _select(
        self, boxes: Tensor, scores: Tensor, image_size: tuple[int, int], selection: Selection
    ) -> BoxDetections:
        """Steps of torchvision's `postprocess_detections` for one image: boxes (L, C, 4), scores (L, C)."""
        boxes = clip_boxes_to_image(boxes, image_size)
        # 1. Every class of every proposal is a candidate, the background (class 0) is not.
        rows, labels = torch.where(scores[:, 1:] > selection.score_thresh)
        labels = labels + 1
        if selection.labels is not None:
            wanted = torch.isin(labels, torch.tensor(sorted(selection.labels), device=labels.device))
            rows, labels = rows[wanted], labels[wanted]
        boxes, scores = boxes[rows, labels], scores[rows, labels]
        # 2. Drop empty boxes, then what overlaps a better box of its class.
        keep = remove_small_boxes(boxes, min_size=MIN_BOX_SIDE)
        boxes, labels, scores = boxes[keep], labels[keep], scores[keep]
        keep = batched_nms(boxes, scores, labels, self.nms_thresh)[: selection.detections_per_img]
        return BoxDetections(boxes[keep], labels[keep], scores[keep])


def _with_op(pooler: RoIPooler, op: str | None) -> RoIPooler:
    """The pooler with another operator. Poolers have no weights, so one can be made for a single call."""
    if op is None:
        return pooler
    roi = pooler.roi.model_copy(update={"op": op})
    return RoIPooler(roi=roi, output_size=pooler.output_size, strides=pooler.strides)
