"""Non-maximum suppression for all images and classes of a batch together, with the same results as torchvision.

Shapes: K boxes of the whole batch, N images, G groups (the classes of every image). Boxes are (x1, y1, x2, y2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor

from service.devices import device_of
from service.ops._cpu_boxes import MOST_BOXES_MOVED, suppress_groups
from service.ops._kernel_check import kernels_work

Floats = NDArray[np.float32]

# Up to this many coordinates in an image, torchvision offsets the boxes by class and suppresses all classes at once.
# The offset costs precision, so matching its results requires the same offset.
_MOST_COORDINATES_MOVED_ON_CPU = 4 * MOST_BOXES_MOVED
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
        """(limit or fewer,) int64 for each image: the indices of its boxes, best first. Equal scores keep their given
        order.
        """
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
    iou_thresh: float | Tensor,
    largest_group: int,
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
        iou_thresh: overlap above which the worse box is dropped; or (N,) float32, one for each image, `rounded_down`.
        largest_group: no class of an image has more boxes than this.
    """
    if not len(boxes):
        return Kept(images, images.new_zeros(num_images + 1))
    if not isinstance(iou_thresh, Tensor):
        iou_thresh = boxes.new_full((num_images,), float(rounded_down([iou_thresh])[0]))
    by_score = scores.sort(stable=True, descending=True).indices
    moved = _move_classes_apart(boxes, images, classes, valid, num_images)
    grouped = _group(images * num_classes + classes, valid, by_score, num_images * num_classes)
    keep = torch.zeros_like(valid)
    keep[grouped.order] = _suppress(
        moved[grouped.order],
        grouped.groups,
        grouped.starts,
        iou_thresh.unsqueeze(1).expand(-1, num_classes).flatten(),
        min(largest_group, len(boxes)),
    )
    of_images = _group(images, keep, by_score, num_images)
    return Kept(of_images.order, of_images.starts)


def rounded_down(values: Sequence[float]) -> Floats:
    """(len(values),): the largest float32 not above each value. No float32 is between the two, so a float32 comparison
    gives the same result as torchvision's in float64.
    """
    exact = np.asarray(values, np.float64)
    nearest = exact.astype(np.float32)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


@dataclass(frozen=True, slots=True, eq=False)
class _Grouped:
    """Boxes group by group, best first, with those of no group at the end.

    Attributes:
        order: (K,) int64 indices of the boxes.
        groups: (K,) int64, the group of each in this order; G for none.
        starts: (G + 1,) int64, where each group starts.
    """

    order: Tensor
    groups: Tensor
    starts: Tensor


def _group(groups: Tensor, members: Tensor, by_score: Tensor, num_groups: int) -> _Grouped:
    in_order = groups.masked_fill(~members, num_groups)[by_score].sort(stable=True)
    starts = torch.searchsorted(in_order.values, torch.arange(num_groups + 1, device=groups.device))
    return _Grouped(by_score[in_order.indices], in_order.values, starts)


def _move_classes_apart(boxes: Tensor, images: Tensor, classes: Tensor, valid: Tensor, num_images: int) -> Tensor:
    furthest = boxes.amax(dim=1).masked_fill(~valid, 0)
    furthest_of_image = boxes.new_zeros(num_images).scatter_reduce_(0, images, furthest, "amax")
    counts = torch.zeros(num_images, dtype=torch.int64, device=boxes.device).scatter_add_(0, images, valid.long())
    on_cpu = boxes.device.type == "cpu"  # as torchvision asks
    is_moved = counts * 4 <= (_MOST_COORDINATES_MOVED_ON_CPU if on_cpu else _MOST_COORDINATES_MOVED_ELSEWHERE)
    steps = torch.where(is_moved, furthest_of_image + 1, 0)
    return boxes + (classes.to(boxes.dtype) * steps[images]).unsqueeze(1)


def _suppress(boxes: Tensor, groups: Tensor, starts: Tensor, iou_threshs: Tensor, largest: int) -> Tensor:
    """Which boxes to keep.

    Args:
        boxes: (K, 4) float32, group by group, best first.
        groups: (K,) int64, the group of each; G for none, which comes last and is dropped.
        starts: (G + 1,) int64, where each group starts.
        iou_threshs: (G,) float32, see `rounded_down`.
        largest: no group has more boxes than this.

    Returns:
        (K,) bool.
    """
    kernels = device_of(boxes.device).kernels
    if kernels == "numba":
        return _suppress_by_numba(boxes, groups, starts, iou_threshs, largest)
    if kernels == "triton" and _triton_suppresses_alike(boxes.device):
        return _suppress_by_triton(boxes, groups, starts, iou_threshs, largest)
    return _suppress_by_torchvision(boxes, groups, starts, iou_threshs, largest)


def _suppress_by_triton(boxes: Tensor, groups: Tensor, starts: Tensor, iou_threshs: Tensor, largest: int) -> Tensor:
    """See `_suppress`."""
    # Imported here: Triton comes with PyTorch for CUDA on Linux only.
    from service.ops import _cuda_suppression

    return _cuda_suppression.suppress(boxes, groups, starts, iou_threshs, largest=largest)


@cache
def _triton_suppresses_alike(device: torch.device) -> bool:
    """Whether our kernels run on this GPU and keep the same boxes as the CPU's. It takes one batch of boxes to find
    out, once.
    """
    numbers = torch.Generator().manual_seed(0)
    corners = torch.rand(300, 2, generator=numbers) * 100
    boxes = torch.cat([corners, corners + 10 + torch.rand(300, 2, generator=numbers) * 40], dim=1)
    starts = torch.tensor([0, 3, 210, 210, 290])
    groups = torch.bucketize(torch.arange(len(boxes)), starts[1:], right=True)
    given = boxes, groups, starts, torch.from_numpy(rounded_down([0.3, 0.5, 0.5, 0.7]))

    def check() -> bool:
        from service.ops._cuda_suppression import suppress

        on_device = [one.to(device) for one in given]
        expected = _suppress_by_numba(*given, largest=len(boxes))
        # With overlaps stored, and without.
        return all(
            torch.equal(suppress(*on_device, largest=len(boxes), most_bytes=most).cpu(), expected)
            for most in (1 << 20, 0)
        )

    return kernels_work(check, device=device, purpose="suppression", instead="torchvision's, which wait")


def _suppress_by_numba(boxes: Tensor, groups: Tensor, starts: Tensor, iou_threshs: Tensor, largest: int) -> Tensor:
    """See `_suppress`."""
    keep = np.zeros(len(boxes), np.bool_)
    suppress_groups(np.ascontiguousarray(boxes.numpy().T), starts.numpy(), iou_threshs.numpy(), keep)
    return torch.from_numpy(keep)


def _suppress_by_torchvision(
    boxes: Tensor, groups: Tensor, starts: Tensor, iou_threshs: Tensor, largest: int
) -> Tensor:
    """See `_suppress`; this kernel synchronizes with the device, twice for each threshold."""
    boxes = boxes.masked_fill((groups == len(iou_threshs)).unsqueeze(1), 0)  # which may be NaN
    # In float64 the groups can be moved apart without loss of precision.
    apart = boxes.double() + (groups * (boxes.amax().double() + 1)).unsqueeze(1)
    ranks = -torch.arange(len(boxes), dtype=torch.float64, device=boxes.device)
    thresh_of_box = torch.cat([iou_threshs, iou_threshs.new_full((1,), torch.inf)])[groups]
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for iou_thresh in set(iou_threshs.tolist()):
        kept = torch.zeros_like(keep)
        kept[torchvision.ops.nms(apart, ranks, iou_thresh)] = True
        keep |= kept & (thresh_of_box == iou_thresh)
    return keep
