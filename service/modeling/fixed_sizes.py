"""The path of a batch in which no tensor's size depends on what is found: proposals, candidates and detections have a
fixed capacity and are padded. So nothing is copied between host and device on the way, and a CUDA graph can hold all of
it. Answers are those of `GeneralizedRCNN.detect`.

Shapes: N images, P proposals and K candidates of each, D detections of each, C classes with the background, M x M mask
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from service.modeling.box_regression import decode_boxes
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.roi_heads import MIN_BOX_SIDE, RoIHeads, Selection, wanted_labels
from service.ops.nms import best_of_each_image

CANDIDATES = 4096
"""K. A proposal has at most `1 / score_thresh` classes above the threshold, since its scores add up to 1, and most have
none or one.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What is wanted of each image, as columns of one (N, 10 + C) float32 tensor, so that one copy brings them to the
    device.

    Attributes:
        table: (N, 10 + C): the height and width of the resized image; the factors from there to the original one for
            x1, y1, x2 and y2; the score threshold; the limit of detections; the NMS threshold (`rounded_down`); 1 if
            NMS regards no classes; 1 for each class that is wanted.
    """

    table: Tensor

    @classmethod
    def of(
        cls,
        selections: Sequence[Selection],
        *,
        heads: RoIHeads,
        resized: Sequence[tuple[int, int]],
        original: Sequence[tuple[int, int]],
    ) -> Wanted:
        """On the host.

        Args:
            selections: one for each image.
            heads: the network's; their settings hold where a selection has none.
            resized: (height, width) of each image as the network sees it.
            original: (height, width) of each image.
        """
        sizes = torch.tensor(resized, dtype=torch.float32).reshape(-1, 2)
        factors = (torch.tensor(original, dtype=torch.float32).reshape(-1, 2) / sizes)[:, [1, 0, 1, 0]]
        labels = wanted_labels(selections, heads.num_classes)
        columns = [
            torch.tensor([one.score_thresh for one in selections], dtype=torch.float32),
            torch.tensor([one.detections_per_img for one in selections], dtype=torch.float32),
            heads.iou_threshs(selections),
            torch.tensor(heads.are_agnostic(selections), dtype=torch.float32),
        ]
        return cls(torch.cat([sizes, factors, torch.stack(columns, dim=1), torch.tensor(labels).float()], dim=1))

    @property
    def sizes(self) -> Tensor:
        """(N, 2) (height, width) of the resized images."""
        return self.table[:, :2]

    @property
    def factors(self) -> Tensor:
        """(N, 4), from pixels of the resized image to those of the original."""
        return self.table[:, 2:6]


@dataclass(frozen=True, slots=True, eq=False)
class FixedDetections:
    """The detections in all images, on the device, best first; rows beyond `counts` are 0.

    Attributes:
        boxes: (N, D, 4) float32 in pixels of the original images.
        labels: (N, D) int64, 1-based.
        scores: (N, D) float32.
        masks: (N, D, M, M) float32 probabilities spread over the box; None if not requested.
        counts: (N,) int64, how many each image has.
        fit: (N,) bool; False if an image had more candidates than the capacity, so that its detections may be wrong.
        was_read: the anchors, which a recording of this reads at each replay: they must be kept as long.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    counts: Tensor
    fit: Tensor
    was_read: Sequence[Tensor] = ()


@torch.inference_mode()
def detect_fixed(
    model: GeneralizedRCNN,
    batch: Tensor,
    wanted: Wanted,
    *,
    capacity: int = CANDIDATES,
    max_detections: int,
    with_masks: bool,
) -> FixedDetections:
    """Detect objects in a batch, without waiting for the device.

    Args:
        model: has an RPN.
        batch: (N, C, H, W) from the model's transform.
        wanted: on the device.
        capacity: K.
        max_detections: D; the limits in `wanted` must not exceed it.
        with_masks: whether to predict masks, of all images.
    """
    parts, heads = model.parts or model.own_parts(), model.roi_heads
    trunk = parts.trunk(batch)
    grid_sizes = [(one.shape[2], one.shape[3]) for one in trunk.features.values()]
    anchors = model.rpn.lay_anchors((batch.shape[2], batch.shape[3]), grid_sizes, batch.device)
    proposals = model.rpn.propose_table(
        trunk.objectness, trunk.deltas, anchors=anchors, grid_sizes=grid_sizes, image_sizes=wanted.sizes
    )
    pooled = heads.box_roi_pool(trunk.features, list(proposals.unbind()), [])
    class_logits, box_regression = parts.box_head(pooled)
    num_images, num_proposals, _ = proposals.shape
    found = _select(
        heads,
        class_logits.float().softmax(-1).unflatten(0, (num_images, num_proposals)),
        box_regression.float().unflatten(0, (num_images, num_proposals)),
        proposals,
        wanted,
        capacity,
        max_detections,
    )
    masks = None
    if with_masks:
        assert parts.mask_head is not None
        patches = heads.mask_roi_pool(trunk.features, list(found.boxes.unbind()), [])
        logits = parts.mask_head(patches, found.labels.flatten())
        masks = logits.float().sigmoid().unflatten(0, (num_images, max_detections))
    boxes = found.boxes * wanted.factors.unsqueeze(1)
    if model.transform.is_detectron2s:
        # To the original images, as `GeneralizedRCNN.detect` does. The products are whole numbers but for rounding.
        limits = (wanted.sizes.flip(1).repeat(1, 2) * wanted.factors).round()
        boxes = torch.minimum(boxes, limits.unsqueeze(1))
    return FixedDetections(boxes, found.labels, found.scores, masks, found.counts, found.fit, [anchors])


def _select(
    heads: RoIHeads,
    scores: Tensor,
    box_regression: Tensor,
    proposals: Tensor,
    wanted: Wanted,
    capacity: int,
    max_detections: int,
) -> FixedDetections:
    """The steps of `RoIHeads._select`: scores (N, P, C), regression (N, P, 4 C), proposals (N, P, 4). Boxes are in
    pixels of the resized images.
    """
    num_images, _, num_classes = scores.shape
    score_threshs, limits, iou_threshs, agnostic = wanted.table[:, 6:10].unbind(dim=1)
    # 1. The candidates of each image, moved together in their order.
    exist = (proposals[..., 2:] > proposals[..., :2]).all(dim=2, keepdim=True)
    is_wanted = wanted.table[:, 10:].unsqueeze(1) > 0
    is_candidate = ((scores > score_threshs.reshape(-1, 1, 1)) & is_wanted & exist).flatten(start_dim=1)
    places = is_candidate.cumsum(dim=1)
    num_candidates = places[:, -1]
    # Place K is for all others.
    places = torch.where(is_candidate, places - 1, capacity).clamp(max=capacity)
    numbers = torch.arange(places.shape[1], device=scores.device).expand_as(places)
    chosen = places.new_zeros(num_images, capacity + 1).scatter_(1, places, numbers)[:, :capacity]
    rows, labels = chosen // num_classes, chosen % num_classes
    scores = scores.flatten(start_dim=1).gather(1, chosen)
    # 2. Decode their boxes, and clip them to each image.
    regression = box_regression.reshape(num_images, -1, 4).gather(1, chosen.unsqueeze(2).expand(-1, -1, 4))
    sources = proposals.gather(1, rows.unsqueeze(2).expand(-1, -1, 4))
    boxes = decode_boxes(heads.box_coder, regression.flatten(end_dim=1), sources.flatten(end_dim=1))
    boxes = boxes.unflatten(0, (num_images, capacity))
    heights, widths = wanted.sizes.unsqueeze(1).unbind(dim=2)
    boxes = torch.minimum(boxes.clamp(min=0), torch.stack([widths, heights, widths, heights], dim=2))
    # 3. Drop empty boxes, then boxes that overlap a better one of their class (of any class if agnostic).
    is_there = torch.arange(capacity, device=scores.device) < num_candidates.unsqueeze(1)
    valid = (boxes[..., 2:] - boxes[..., :2] >= MIN_BOX_SIDE).all(dim=2) & is_there
    images = torch.arange(num_images, device=scores.device).unsqueeze(1).expand_as(labels)
    kept = best_of_each_image(
        boxes.flatten(end_dim=1),
        scores.flatten(),
        images=images.flatten(),
        classes=torch.where(agnostic.unsqueeze(1) > 0, 0, labels).flatten(),
        valid=valid.flatten(),
        num_images=num_images,
        num_classes=num_classes,
        iou_thresh=iou_threshs,
        largest_group=capacity,
    )
    best, exists = kept.table(max_detections)
    exists &= torch.arange(max_detections, device=scores.device) < limits.unsqueeze(1)
    return FixedDetections(
        boxes=boxes.flatten(end_dim=1)[best] * exists.unsqueeze(2),
        labels=labels.flatten()[best] * exists,
        scores=scores.flatten()[best] * exists,
        masks=None,
        counts=exists.sum(dim=1),
        fit=num_candidates <= capacity,
    )
