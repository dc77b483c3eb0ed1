"""RoI heads: classify and refine proposals, then predict masks. Training is torchvision's `forward`; serving calls the
steps separately, so that each request has its own thresholds and masks are computed only if requested. No step loops
over boxes.

Shapes: R proposals of the whole batch, D detections of one image, C classes with the background, M x M mask size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchvision.models.detection import roi_heads

from service.devices import device_of
from service.modeling.box_regression import decode_boxes
from service.modeling.parts import BoxBranch, BoxHead, MaskBranch, MaskHead
from service.modeling.per_image import image_indices, to_device
from service.modeling.poolers import RoIPooler
from service.ops.nms import best_of_each_image, rounded_down

MIN_BOX_SIDE = 1e-2
"""Pixels; smaller boxes are dropped, as torchvision does."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which of one image's classified boxes are kept.

    Attributes:
        score_thresh: minimum score, exclusive.
        detections_per_img: at most this many, best first.
        labels: only these class ids; None for all.
        nms_thresh: IoU above which the better of two detections suppresses the other; None for the network's own.
        class_agnostic_nms: whether it does so regardless of class; None for the network's own setting.
        with_class_scores: whether the scores of all classes are kept, too.
    """

    score_thresh: float
    detections_per_img: int
    labels: frozenset[int] | None = None
    nms_thresh: float | None = None
    class_agnostic_nms: bool | None = None
    with_class_scores: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class BoxDetections:
    """One image's kept boxes on the device: (D, 4) in pixels of the resized image, (D,) int64, (D,), and further
    outputs by name: (D, ...) float32.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def none(self) -> BoxDetections:
        """The same image without any boxes."""
        return BoxDetections(self.boxes[:0], self.labels[:0], self.scores[:0])


class RoIHeads(roi_heads.RoIHeads):
    """torchvision's heads with the steps of inference exposed.

    Attributes:
        class_agnostic_nms: whether a detection also suppresses detections of other classes, which torchvision never
            does.
    """

    class_agnostic_nms: bool = False

    @property
    def num_classes(self) -> int:
        """C."""
        classes: int = self.box_predictor.cls_score.out_features
        return classes

    def iou_threshs(self, selections: Sequence[Selection]) -> Tensor:
        """(N,) float32 on the host, `rounded_down`: each image's threshold of suppression."""
        threshs = [self.nms_thresh if one.nms_thresh is None else one.nms_thresh for one in selections]
        return torch.from_numpy(rounded_down(threshs))

    def are_agnostic(self, selections: Sequence[Selection]) -> list[bool]:
        """Whether suppression regards no classes, for each image."""
        own = self.class_agnostic_nms
        return [own if one.class_agnostic_nms is None else one.class_agnostic_nms for one in selections]

    def detect_boxes(
        self,
        features: Mapping[str, Tensor],
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        selections: Sequence[Selection],
        *,
        roi_op: str | None = None,
        box_head: BoxHead | None = None,
    ) -> list[BoxDetections]:
        """Classify and refine the proposals of each image, and keep the boxes that match its selection.

        Args:
            features: feature maps by name.
            proposals: (L, 4) for each image, in pixels of the resized image.
            image_sizes: each resized image's (height, width); boxes are clipped to it.
            selections: one for each image.
            roi_op: used instead of the configured operator, with the same parameters.
            box_head: runs the head and the predictor; the heads' own modules if None.
        """
        pooled = _with_op(self.box_roi_pool, roi_op)(features, proposals, image_sizes)
        class_logits, box_regression = (box_head or BoxBranch(self.box_head, self.box_predictor))(pooled)
        return self._select(
            class_logits.float().softmax(-1), box_regression.float(), proposals, image_sizes, selections
        )

    def detect_masks(
        self,
        features: Mapping[str, Tensor],
        detections: Sequence[BoxDetections],
        image_sizes: Sequence[tuple[int, int]],
        *,
        roi_op: str | None = None,
        mask_head: MaskHead | None = None,
    ) -> list[Tensor]:
        """Predict the mask of each detection: (D, M, M) probabilities of its own class, for each image.

        Args:
            features: feature maps by name.
            detections: of each image.
            image_sizes: each resized image's (height, width).
            roi_op: used instead of the configured operator, with the same parameters.
            mask_head: runs the head and the predictor; the heads' own modules if None.
        """
        boxes = [one.boxes for one in detections]
        labels = torch.cat([one.labels for one in detections])
        pooled = _with_op(self.mask_roi_pool, roi_op)(features, boxes, image_sizes)
        logits = (mask_head or MaskBranch(self.mask_head, self.mask_predictor))(pooled, labels)
        return list(logits.float().sigmoid().split([len(one) for one in boxes]))

    def _select(
        self,
        scores: Tensor,
        box_regression: Tensor,
        proposals: Sequence[Tensor],
        image_sizes: Sequence[tuple[int, int]],
        selections: Sequence[Selection],
    ) -> list[BoxDetections]:
        """Like torchvision's `postprocess_detections`, for the whole batch: scores (R, C), regression (R, 4 C)."""
        device, num_classes = scores.device, scores.shape[1]
        image_of_row = image_indices([len(one) for one in proposals], device)
        # 1. Every class of every proposal is a candidate, except the background (class 0). Synchronizes with the
        # device.
        threshs = to_device([one.score_thresh for one in selections], scores.dtype, device)
        wanted = to_device(wanted_labels(selections, num_classes), torch.bool, device)
        is_candidate = (scores > threshs[image_of_row].unsqueeze(1)) & wanted[image_of_row]
        rows, labels = is_candidate.nonzero(as_tuple=True)
        class_scores, images, scores = scores, image_of_row[rows], scores[rows, labels]
        # 2. Decode only their boxes, and clip them to each image.
        regression = box_regression.reshape(len(box_regression), num_classes, 4)[rows, labels]
        boxes = decode_boxes(self.box_coder, regression, torch.cat(list(proposals))[rows])
        heights, widths = to_device(image_sizes, boxes.dtype, device)[images].unbind(dim=1)
        boxes = torch.minimum(boxes.clamp(min=0), torch.stack([widths, heights, widths, heights], dim=1))
        # 3. Drop empty boxes, then boxes that overlap a better one of their class (of any class if agnostic).
        agnostic = self.are_agnostic(selections)
        groups = labels.masked_fill(to_device(agnostic, torch.bool, device)[images], 0) if any(agnostic) else labels
        valid = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(dim=1)
        kept = best_of_each_image(
            boxes,
            scores,
            images=images,
            classes=groups,
            valid=valid,
            num_images=len(selections),
            num_classes=num_classes,
            iou_thresh=device_of(device).upload(self.iou_threshs(selections)),
            largest_group=max(map(len, proposals)) * (num_classes if any(agnostic) else 1),
        ).up_to([one.detections_per_img for one in selections])
        return [
            BoxDetections(
                boxes[one],
                labels[one],
                scores[one],
                {"class_scores": class_scores[rows[one]]} if selection.with_class_scores else {},
            )
            for one, selection in zip(kept, selections, strict=True)
        ]


def wanted_labels(selections: Sequence[Selection], num_classes: int) -> list[list[bool]]:
    """N lists of C: which classes each image keeps, by label; never the background.

    Args:
        selections: one for each image.
        num_classes: C.
    """
    every = range(1, num_classes)
    kept = [every if one.labels is None else one.labels for one in selections]
    return [[label != 0 and label in labels for label in range(num_classes)] for labels in kept]


def _with_op(pooler: RoIPooler, op: str | None) -> RoIPooler:
    """The pooler with another operator. Poolers have no weights, so one can be made for a single call."""
    if op is None:
        return pooler
    roi = pooler.roi.model_copy(update={"op": op})
    return RoIPooler(roi=roi, output_size=pooler.output_size, strides=pooler.strides)
