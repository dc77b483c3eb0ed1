"""Regions of interest: the table of boxes that every operator works on, validated before it reaches a kernel.
torchvision's kernels trust their caller: a NaN or a wrong image index makes them read outside the feature map.

Shapes: N images, C channels, H x W cells of the feature map, L boxes of one image, K boxes of the whole batch.
Boxes are (x1, y1, x2, y2). A cell is one element of the feature map, `1 / spatial_scale` image pixels wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Boxes = Tensor | Sequence[Tensor]

# Beyond this, float32 cannot tell neighbouring cells apart, and the kernels' int32 arithmetic comes close to overflow.
_MAX_CELLS = 2.0**24
# Boxes clipped to the image fit the map; four times its side leaves room for unclipped ones.
_MAX_ADAPTIVE_SIDE_IN_MAPS = 4


def as_rois(boxes: Boxes, input: Tensor, spatial_scale: float) -> Tensor:
    """Check boxes against the feature map and convert them to its cells.

    Reads the boxes' extremes back from the device: one synchronisation per call, however many boxes there are.

    Args:
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each of the N images; an empty list means no
            boxes.
        input: (N, C, H, W) of any floating-point dtype.
        spatial_scale: cells per unit of the boxes, `1 / stride` for boxes in image pixels.

    Returns:
        (K, 5) as (image index, x1, y1, x2, y2) in cells, in the dtype of `at_least_float32(input)`. Inside-out boxes
        become empty boxes at their (x1, y1).

    Raises:
        ValueError: other shapes, an image index out of range, or a coordinate that is NaN, infinite or absurdly far
            away.
    """
    if input.ndim != 4 or not input.is_floating_point() or 0 in input.shape[1:]:
        raise ValueError(f"expected a floating (N, C, H, W) input, none of C, H, W 0, got {_describe(input)}")
    if not (math.isfinite(spatial_scale) and spatial_scale > 0):
        raise ValueError(f"expected a finite spatial_scale above 0, got {spatial_scale}")
    table = _as_table(boxes, input)
    starts, ends = table[:, 1:3] * spatial_scale, table[:, 3:] * spatial_scale
    rois = torch.cat([table[:, :1], starts, ends], dim=1)
    if len(rois):
        _check_values(rois, num_images=len(input))
    # With adaptive sampling, torchvision's CPU kernel would reserve a negative amount of memory for an inside-out box.
    return torch.cat([rois[:, :3], torch.maximum(starts, ends)], dim=1)


def rois_of(boxes: Sequence[Tensor]) -> Tensor:
    """Combine the boxes of several images into one table.

    Args:
        boxes: (L, 4) for each image, at least one.

    Returns:
        (K, 5) as (image index, x1, y1, x2, y2).
    """
    indices = [one.new_full((len(one), 1), index) for index, one in enumerate(boxes)]
    return torch.cat([torch.cat(indices), torch.cat(list(boxes))], dim=1)


def at_least_float32(input: Tensor) -> Tensor:
    """Widen half precision: 16 bits cannot represent box coordinates (float16 has steps of 2 pixels beyond 2048)."""
    return input if input.dtype == torch.float64 else input.float()


def as_pair(output_size: int | Sequence[int]) -> tuple[int, int]:
    """Read an output size, (height, width) or one number for both.

    Raises:
        ValueError: not one or two whole numbers of 1 or more.
    """
    sides = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"expected an output_size of one or two whole numbers of 1 or more, got {output_size}")
    return sides[0], sides[1]


def check_adaptive(rois: Tensor, input: Tensor) -> None:
    """Reject boxes on which adaptive sampling would take forever: the number of points grows with a box's area.

    Args:
        rois: (K, 5) in cells, from `as_rois`.
        input: (N, C, H, W).

    Raises:
        ValueError: a box is many times larger than the feature map.
    """
    if not len(rois):
        return
    limit = _MAX_ADAPTIVE_SIDE_IN_MAPS * max(input.shape[2:])
    side = float((rois[:, 3:] - rois[:, 1:3]).amax())
    if side > limit:
        raise ValueError(
            f"expected boxes of up to {limit} cells a side for adaptive sampling on a map of {tuple(input.shape[2:])}, "
            f"got {side:g}; clip them to the image, or set sampling_ratio"
        )


def _as_table(boxes: Boxes, input: Tensor) -> Tensor:
    dtype = torch.promote_types(input.dtype, torch.float32)
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(f"expected boxes (K, 5) or a list of (L, 4), got {_describe(boxes)}")
        return boxes.to(dtype)
    if not boxes:
        return input.new_empty((0, 5), dtype=dtype)
    if len(boxes) != len(input) or any(one.ndim != 2 or one.shape[1] != 4 for one in boxes):
        got = ", ".join(_describe(one) for one in boxes)
        raise ValueError(f"expected boxes (L, 4) for each of {len(input)} images, got {len(boxes)}: {got}")
    return rois_of([one.to(dtype) for one in boxes])


def _check_values(rois: Tensor, *, num_images: int) -> None:
    # All three reductions propagate NaN, and each comparison below is written so that NaN fails it.
    first, last = rois[:, 0].aminmax()
    first_index, last_index, furthest = torch.stack([first, last, rois[:, 1:].abs().amax()]).tolist()
    if not (first_index >= 0 and last_index < num_images):
        raise ValueError(f"expected image indices from 0 to {num_images - 1}, got {first_index:g} to {last_index:g}")
    if not furthest < _MAX_CELLS:
        wrong = ~(rois[:, 1:].abs() < _MAX_CELLS).all(dim=1)
        raise ValueError(
            f"expected box coordinates that are finite and within {_MAX_CELLS:.0f} cells, got a box at "
            f"{rois[wrong][0, 1:].tolist()} (in cells of the feature map)"
        )


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
