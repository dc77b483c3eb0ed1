"""A network's convolutional parts as functions, which an inference engine may replace. The steps between them (anchors,
boxes, suppression, RoI operators) are not parts.

Shapes: N images, R proposals of the whole batch, C channels, S x S pooled size, A anchors of all levels of an image,
K classes with the background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor

BoxHead = Callable[[Tensor], tuple[Tensor, Tensor]]
MaskHead = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class TrunkOutput:
    """The trunk's output for a batch.

    Attributes:
        features: (N, C, H', W') by name, finest first; fastest in `torch.channels_last` on the CPU.
        objectness: (N, A) logits: level by level, row by row, with the anchors of a location next to each other.
        deltas: (N, A, 4) in the same order.
    """

    features: Mapping[str, Tensor]
    objectness: Tensor
    deltas: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Functions to call in inference mode, on the network's device. A result may be overwritten by the next call of the
    same part.

    Attributes:
        trunk: backbone, pyramid and RPN head, for a normalised batch (N, 3, H, W) float; 1 channel for grey and 4 for
            RGBA models.
        backbone: the feature maps alone, for batches that come with proposals.
        box_head: (R, C, S, S) -> class logits (R, K) and box regression (R, 4 K).
        mask_head: (R, C, S, S) and labels (R,) -> mask logits (R, M, M) of each proposal's class; None without masks.
    """

    trunk: Callable[[Tensor], TrunkOutput]
    backbone: Callable[[Tensor], Mapping[str, Tensor]]
    box_head: BoxHead
    mask_head: MaskHead | None


class BoxBranch(nn.Module):
    """Box head and predictor in one."""

    def __init__(self, head: nn.Module, predictor: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.predictor = predictor

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parts.box_head`."""
        class_logits, box_regression = self.predictor(self.head(pooled))
        return class_logits, box_regression


class MaskBranch(nn.Module):
    """Mask head and predictor in one, for one class per proposal instead of all.

    The predictor's transposed convolution has stride 2 and a kernel of 2 x 2, so its output patches do not overlap: it
    is a matrix product that computes four pixels per location, and the class's 1 x 1 convolution can be applied before
    the pixels are rearranged.
    """

    def __init__(self, head: nn.Module, predictor: MaskRCNNPredictor) -> None:
        super().__init__()
        finer, logits = predictor.conv5_mask, predictor.mask_fcn_logits
        assert isinstance(finer, nn.ConvTranspose2d)
        assert isinstance(logits, nn.Conv2d)
        self.head = head
        self.finer = finer
        self.logits = logits

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """See `Parts.mask_head`."""
        places = self.head(pooled).permute(0, 2, 3, 1)
        # (in, out, 2, 2) -> (2 * 2 * out, in)
        weight = self.finer.weight.permute(2, 3, 1, 0).flatten(end_dim=2)
        assert self.finer.bias is not None  # as torchvision builds them
        assert self.logits.bias is not None
        pixels = functional.relu(functional.linear(places, weight, self.finer.bias.repeat(4)))
        rows, height, width = pixels.shape[0], pixels.shape[1], pixels.shape[2]
        own_class = self.logits.weight.flatten(start_dim=1)[labels].unsqueeze(2)
        # (R, S * S * 4, C) x (R, C, 1)
        own_logits = pixels.reshape(rows, height * width * 4, own_class.shape[1]) @ own_class
        own_logits = own_logits + self.logits.bias[labels].reshape(rows, 1, 1)
        patches = own_logits.reshape(rows, height, width, 2, 2).permute(0, 1, 3, 2, 4)
        return patches.reshape(rows, height * 2, width * 2)


def run_trunk(backbone: nn.Module, rpn_head: nn.Module, batch: Tensor) -> TrunkOutput:
    """See `Parts.trunk`."""
    features = backbone(batch)
    objectness, deltas = rpn_head(list(features.values()))
    return TrunkOutput(features, flatten_levels(objectness), flatten_levels(deltas).unflatten(1, (-1, 4)))


def flatten_levels(levels: Sequence[Tensor]) -> Tensor:
    """(N, values per location, H', W') of each level -> (N, values of all locations of all levels), location by
    location.
    """
    return torch.cat([one.permute(0, 2, 3, 1).flatten(start_dim=1) for one in levels], dim=1)
