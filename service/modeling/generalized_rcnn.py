"""A whole detector: transform, backbone, RPN, RoI heads. `detect` shows the whole path of a batch. torchvision's own
`forward` is used for training, and is the reference for `detect` in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection import generalized_rcnn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from service.devices import device_of
from service.modeling.parts import BoxBranch, MaskBranch, Parts, TrunkOutput, run_trunk
from service.modeling.per_image import image_indices, to_device
from service.modeling.roi_heads import RoIHeads, Selection
from service.modeling.rpn import RegionProposalNetwork
from service.modeling.transform import Transform

MIN_PROPOSAL_SIDE = 1e-3
"""Pixels of the original image; smaller proposals from the caller are dropped (torchvision's RPN has the same limit).
"""

StageTimer = Callable[[str], AbstractContextManager[None]]
"""Takes a stage's name and returns a context that measures it."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageDetections:
    """The detections in one image, on the device, best first.

    Attributes:
        boxes: (D, 4) float32 (x1, y1, x2, y2) in pixels of the original image.
        labels: (D,) int64, 1-based.
        scores: (D,) float32.
        masks: (D, M, M) float32 probabilities spread over the box; None if not requested.
        extras: further outputs by name: (D, ...) float32.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None
    extras: Mapping[str, Tensor] = field(default_factory=dict)


class GeneralizedRCNN(generalized_rcnn.GeneralizedRCNN):
    """torchvision's detector, with an inference path of our own over the same modules."""

    transform: Transform
    rpn: RegionProposalNetwork
    roi_heads: RoIHeads
    has_rpn = True
    """Whether it proposes boxes itself, and so has a trunk with an RPN head."""
    parts: Parts | None = None
    """An engine's replacement for the convolutional modules; None to run the modules themselves."""

    @torch.inference_mode()
    def detect(
        self,
        images: Sequence[Tensor],
        selections: Sequence[Selection],
        *,
        with_masks: Sequence[bool],
        proposals: Sequence[Tensor | None],
        roi_op: str | None = None,
        timed: StageTimer = lambda stage: nullcontext(),
    ) -> list[ImageDetections]:
        """Detect objects in a batch.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes, on the network's device. An image's result is independent of
                the others if all share one `transform.padded_size`.
            selections: which detections each image keeps.
            with_masks: whether to predict each image's masks.
            proposals: (L, 4) on the host in pixels of each original image, clipped to it here: boxes to classify and
                refine, as Fast R-CNN does; None for the RPN's. The RPN's proposals are computed only for images without
                their own.
            roi_op: the operator of the box and the mask branch for this batch; None for the model's own.
            timed: measures `preprocess, backbone, rpn, roi_heads, postprocess`. The RPN's convolutions run together
                with the backbone's and count as `backbone`.
        """
        parts = self.parts or self.own_parts()
        with timed("preprocess"):
            batch = self.transform.prepare(images)
            sizes = batch.image_sizes
        with timed("backbone"):
            trunk = parts.trunk(batch.tensors) if any(one is None for one in proposals) else None
            features = parts.backbone(batch.tensors) if trunk is None else trunk.features
        with timed("rpn"):
            candidates = self._propose(batch, trunk, images, proposals)
        with timed("roi_heads"):
            found = self.roi_heads.detect_boxes(
                features, candidates, sizes, selections, roi_op=roi_op, box_head=parts.box_head
            )
            masks: list[Tensor | None] = [None] * len(found)
            wanted = [index for index, wants in enumerate(with_masks) if wants and parts.mask_head is not None]
            if wanted:
                # The pooler finds an image's features by its index in the batch, so the other images take part with no
                # boxes.
                asked = [one if index in wanted else one.none() for index, one in enumerate(found)]
                predicted = self.roi_heads.detect_masks(
                    features, asked, sizes, roi_op=roi_op, mask_head=parts.mask_head
                )
                masks = [predicted[index] if index in wanted else None for index in range(len(found))]
        with timed("postprocess"):
            boxes = _to_original(
                [one.boxes for one in found],
                sizes,
                [one.shape[:2] for one in images],
                clips=self.transform.is_detectron2s,
            )
            return [
                ImageDetections(image_boxes, one.labels, one.scores, mask, one.extras)
                for image_boxes, one, mask in zip(boxes, found, masks, strict=True)
            ]

    def own_parts(self) -> Parts:
        """The network's own modules, in their current state."""
        heads = self.roi_heads
        return Parts(
            trunk=partial(run_trunk, self.backbone, self.rpn.head),
            backbone=self.backbone,
            box_head=BoxBranch(heads.box_head, heads.box_predictor),
            mask_head=None if heads.mask_head is None else MaskBranch(heads.mask_head, heads.mask_predictor),
        )

    def _propose(
        self,
        batch: ImageList,
        trunk: TrunkOutput | None,
        images: Sequence[Tensor],
        given: Sequence[Tensor | None],
    ) -> list[Tensor]:
        """Each image's proposals in pixels of the resized image: the given ones, else the RPN's."""
        proposed = iter(self._run_rpn(batch, trunk, [index for index, boxes in enumerate(given) if boxes is None]))
        upload = device_of(batch.tensors.device).upload
        return [
            next(proposed) if boxes is None else upload(_to_resized(boxes, image.shape[:2], size))
            for boxes, image, size in zip(given, images, batch.image_sizes, strict=True)
        ]

    def _run_rpn(self, batch: ImageList, trunk: TrunkOutput | None, indices: Sequence[int]) -> list[Tensor]:
        """The RPN's proposals for some images of the batch."""
        if trunk is None:
            return []
        objectness, deltas = trunk.objectness, trunk.deltas
        if len(indices) < len(objectness):
            rows = to_device(indices, torch.int64, objectness.device)
            objectness, deltas = objectness[rows], deltas[rows]
        height, width = batch.tensors.shape[-2:]
        return self.rpn.propose(
            objectness,
            deltas,
            padded_size=(height, width),
            grid_sizes=[(one.shape[-2], one.shape[-1]) for one in trunk.features.values()],
            image_sizes=[batch.image_sizes[index] for index in indices],
        )


def _to_original(
    boxes: Sequence[Tensor], resized: Sequence[Sequence[int]], original: Sequence[Sequence[int]], *, clips: bool
) -> Sequence[Tensor]:
    """Like torchvision's `resize_boxes`, for all images at once.

    Args:
        clips: whether to clip the boxes to the images once more, as detectron2 does: rounding may leave a box a little
            outside.
    """
    counts = [len(one) for one in boxes]
    ratios = torch.tensor(original, dtype=torch.float32) / torch.tensor(resized, dtype=torch.float32)
    device = boxes[0].device
    image_of_box = image_indices(counts, device)
    upload = device_of(device).upload
    scaled = torch.cat(list(boxes)) * upload(ratios[:, [1, 0, 1, 0]])[image_of_box]
    if clips:
        limits = torch.tensor(original, dtype=torch.float32)[:, [1, 0, 1, 0]]
        scaled = torch.minimum(scaled, upload(limits)[image_of_box])
    return torch.split(scaled, counts)


def _to_resized(boxes: Tensor, original: Sequence[int], resized: Sequence[int]) -> Tensor:
    inside = clip_boxes_to_image(boxes, (original[0], original[1])).float()
    # The RPN drops its own empty boxes too. A box outside the image becomes empty when it is clipped.
    return resize_boxes(inside[remove_small_boxes(inside, MIN_PROPOSAL_SIDE)], list(original), list(resized))
