"""Fast R-CNN: a detector without an RPN: proposals come from the caller or from selective search. It shares the
inference path and the interface of `GeneralizedRCNN`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes

from service.errors import InvalidRequestError
from service.modeling.config import ProposalsConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN, ImageDetections, StageTimer
from service.modeling.proposals import selective_search
from service.modeling.roi_heads import RoIHeads, Selection
from service.modeling.transform import Transform


class NoRPN(nn.Module):
    """Placeholder for the RPN in a detector that has none."""

    head = None


class FastRCNN(GeneralizedRCNN):
    """A detector without an RPN (Girshick 2015). With `CropBranch` in its heads it is R-CNN (Girshick et al. 2014).

    Unlike the original R-CNN, which trains one support vector machine per class on top of a finished network, classes
    are learnt here by a softmax layer together with the box regression, as in Fast R-CNN.

    Args:
        backbone: (N, C, H, W), C the model's channels -> feature maps by name.
        rpn: the placeholder.
        roi_heads: classify and refine the proposals.
        transform: from pixels to the network's input.
        proposals: where they come from.
    """

    has_rpn = False

    def __init__(
        self,
        *,
        backbone: nn.Module,
        rpn: NoRPN,
        roi_heads: RoIHeads,
        transform: Transform,
        proposals: ProposalsConfig,
    ) -> None:
        super().__init__(backbone, rpn, roi_heads, transform)
        self.proposals = proposals

    def forward(  # type: ignore[override]  # torchvision's answers too, in evaluation mode
        self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch in training; use `detect` for inference.

        Args:
            images: (3, H, W) float32 RGB, 0 to 1.
            targets: for each image, `boxes` (K, 4), `labels` (K,) and `proposals` (L, 4) in its pixels. The
                ground-truth boxes are added to the proposals.

        Returns:
            `loss_classifier` and `loss_box_reg`.

        Raises:
            ValueError: there are no targets.
        """
        if targets is None:
            raise ValueError("expected targets: forward trains, and detect finds objects")
        batch, resized = self.transform(list(images), [dict(target) for target in targets])
        proposals = [
            resize_boxes(target["proposals"], list(image.shape[-2:]), list(size))
            for target, image, size in zip(targets, images, batch.image_sizes, strict=True)
        ]
        losses: dict[str, Tensor]
        _, losses = self.roi_heads(self.backbone(batch.tensors), proposals, batch.image_sizes, resized)
        return losses

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
        """Detect objects in a batch; see `GeneralizedRCNN.detect` for the other arguments.

        Args:
            with_masks: not used; there are no masks.
            proposals: None means selective search, if the network is configured for it.
            timed: the search counts towards `rpn`.

        Raises:
            InvalidRequestError: there are no proposals for an image, and the network is not configured to search.
        """
        with timed("rpn"):
            given = [
                self._search(image) if boxes is None else boxes for image, boxes in zip(images, proposals, strict=True)
            ]
        return super().detect(images, selections, with_masks=with_masks, proposals=given, roi_op=roi_op, timed=timed)

    def _search(self, image: Tensor) -> Tensor:
        if self.proposals.source == "caller":
            raise InvalidRequestError(
                "this model proposes no boxes itself; give some as the option 'proposals', [[x1, y1, x2, y2], ...]"
            )
        found = selective_search(np.ascontiguousarray(image.cpu().numpy()), self.proposals)
        return torch.from_numpy(found)
