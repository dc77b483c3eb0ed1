"""Non-maximum suppression for all images and classes of a batch together, with the same results as torchvision.

Shapes: K boxes of the whole batch, N images, G groups (the classes of every image). Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from service.devices import device_of
from service.jit import compiled

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Up to this many coordinates in an image, torchvision offsets the boxes by class and suppresses all classes at once.
# The offset costs precision, so matching its results requires the same offset.
_MOST_COORDINATES_MOVED_ON_CPU = 4000
_MOST_COORDINATES_MOVED_ELSEWHERE = 100_000


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """The boxes that survive suppression.

    Attributes:
        order: (K,) int64 indices, image by image, best first; the suppressed boxes come after all images.
        starts: (N + 1,) int64, where each image starts in `order`.
    """

    order: Tensor
    starts: Tensor

    def up_to(self, limits: Sequence[int]) -> list[Tensor]:
        """The indices of each image's boxes, at most `limits` of them; equal scores keep their given order."""
        bounds = self.starts.tolist()  # the only synchronization with the device
        return [
            self.order[start : min(start + limit, end)]
            for start, end, limit in zip(bounds[:-1], bounds[1:], limits, strict=True)
        ]

    def table(self, count: int) -> tuple[Tensor, Tensor]:
        """(N, count) indices, and (N, count) bool: which of them exist. Does not synchronize with the device."""
        places = self.starts[:-1].unsqueeze(1) + torch.arange(count, device=self.starts.device)
        return self.order[places.clamp(max=len(self.order) - 1)], places < self.starts[1:].unsqueeze(1)


def best_of_each_image(
    boxes: Tensor,
    scores: Tensor,
    *,
    images: Tensor,
    classes: Tensor,
    valid: Tensor,
    num_images: int,
    num_classes: int,
    iou_thresh: float,
) -> Kept:
    """In each image, suppress boxes that overlap a better box of their class, like `torchvision.ops.batched_nms`.

    Args:
        boxes: (K, 4) float32, with no negative coordinates.
        scores: (K,) float32.
        images: (K,) int64 in [0, N).
        classes: (K,) int64 in [0, num_classes): labels, or levels of a pyramid.
        valid: (K,) bool; the others are ignored.
        num_images: N.
        num_classes: see `classes`.
        iou_thresh: overlap above which the worse box is dropped.
    """
    if not len(boxes):
        return Kept(images, images.new_zeros(num_images + 1))
    by_score = scores.sort(stable=True, descending=True).indices
    moved = _move_classes_apart(boxes, images, classes, valid, num_images)
    order, starts = _group(images * num_classes + classes, valid, by_score, num_images * num_classes)
    keep = torch.zeros_like(valid)
    keep[order] = _suppress(moved[order], starts, iou_thresh)
    return Kept(*_group(images, keep, by_score, num_images))


def _group(groups: Tensor, members: Tensor, by_score: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The boxes group by group, best first, with non-members after all groups; and (G + 1,) where each group starts."""
    in_order = groups.masked_fill(~members, num_groups)[by_score].sort(stable=True)
    starts = torch.searchsorted(in_order.values, torch.arange(num_groups + 1, device=groups.device))
    return by_score[in_order.indices], starts


def _move_classes_apart(boxes: Tensor, images: Tensor, classes: Tensor, valid: Tensor, num_images: int) -> Tensor:
    furthest = boxes.amax(dim=1).masked_fill(~valid, 0)
    furthest_of_image = boxes.new_zeros(num_images).scatter_reduce_(0, images, furthest, "amax")
    counts = torch.zeros(num_images, dtype=torch.int64, device=boxes.device).scatter_add_(0, images, valid.long())
    on_cpu = boxes.device.type == "cpu"  # as torchvision asks
    is_moved = counts * 4 <= (_MOST_COORDINATES_MOVED_ON_CPU if on_cpu else _MOST_COORDINATES_MOVED_ELSEWHERE)
    steps = torch.where(is_moved, furthest_of_image + 1, 0)
    return boxes + (classes.to(boxes.dtype) * steps[images]).unsqueeze(1)


def _suppress(boxes: Tensor, starts: Tensor, iou_thresh: float) -> Tensor:
    """(K,) bool: which boxes to keep. They come group by group, best first."""
    kernels = device_of(boxes.device).kernels
    if kernels == "numba":
        return _suppress_by_numba(boxes, starts, iou_thresh)
    if kernels == "triton":
        # Imported here: Triton comes with PyTorch for CUDA on Linux only.
        from service.ops import _cuda_kernels

        return _cuda_kernels.suppress(boxes, starts, iou_thresh)
    return _suppress_by_torchvision(boxes, starts, iou_thresh)


def _suppress_by_numba(boxes: Tensor, starts: Tensor, iou_thresh: float) -> Tensor:
    """See `_suppress`."""
    keep = np.zeros(len(boxes), np.bool_)
    _suppress_groups(np.ascontiguousarray(boxes.numpy().T), starts.numpy(), iou_thresh, keep)
    return torch.from_numpy(keep)


@compiled(divides_by_zero=True)
def _suppress_groups(sides: Floats, starts: Ints, iou_thresh: float, keep: Bools) -> None:
    x1, y1, x2, y2 = sides[0], sides[1], sides[2], sides[3]
    areas = (x2 - x1) * (y2 - y1)
    keep[: starts[-1]] = True
    for group in range(len(starts) - 1):
        end = starts[group + 1]
        for best in range(starts[group], end):
            if keep[best]:
                # Without a branch, so that the loop is vectorized.
                for other in range(best + 1, end):
                    width = min(x2[best], x2[other]) - max(x1[best], x1[other])
                    height = min(y2[best], y2[other]) - max(y1[best], y1[other])
                    overlap = max(width, np.float32(0)) * max(height, np.float32(0))
                    # torchvision compares in float64 too.
                    iou = np.float64(overlap / (areas[best] + areas[other] - overlap))
                    keep[other] &= not iou > iou_thresh


def _suppress_by_torchvision(boxes: Tensor, starts: Tensor, iou_thresh: float) -> Tensor:
    """See `_suppress`; this kernel synchronizes with the device once more."""
    groups = torch.bucketize(torch.arange(len(boxes), device=boxes.device), starts, right=True)
    # In float64 the groups can be moved apart without loss of precision.
    apart = boxes.double() + (groups * (boxes.amax().double() + 1)).unsqueeze(1)
    ranks = -torch.arange(len(boxes), dtype=torch.float64, device=boxes.device)
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[torchvision.ops.nms(apart, ranks, iou_thresh)] = True
    return keep & (groups <= len(starts) - 1)
