"""RoI Align on CUDA, over all feature levels at once, in Triton. Triton comes with PyTorch on Linux; import this module
only if Triton and a GPU are present. Nothing here synchronizes with the device, so bad boxes are made harmless instead
of being rejected.

Shapes: N images, K boxes of the whole batch, C channels, L levels, H x W cells of a level, S x S output
size. A cell is one element of a feature map, `1 / scale` image pixels wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from service.devices import device_of

_MAX_SIDES = 4
"""Boxes are clamped to this many times the extent of the image: the cost of adaptive sampling grows with their area."""


def multi_scale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Average each bin of each box over bilinear samples, as `torchvision.ops.roi_align` does on the box's level.

    Args:
        features: (N, C, H, W) for each level, all of one dtype, half precision or float32; summed in float32.
        rois: (K, 5) float32 as (image index, x1, y1, x2, y2) in image pixels. Non-finite coordinates become 0, absurdly
            distant ones are clamped, and inside-out boxes become empty boxes at their (x1, y1).
        levels: (K,) int64, each box's index in `features`.
        scales: cells per image pixel of each level.
        output_size: S.
        sampling_ratio: samples along each side of a bin; 0 for as many as the bin has cells.
        aligned: whether pixel centers, not corners, have whole coordinates.

    Returns:
        (K, C, S, S) in the features' dtype, in `torch.channels_last`.
    """
    channels, device = features[0].shape[1], rois.device
    # Copied into one tensor, so that one kernel reads all levels.
    cells = torch.cat([one.permute(0, 2, 3, 1).reshape(-1, channels) for one in features])
    furthest = _MAX_SIDES * max(features[0].shape[2:]) / scales[0]
    corners = rois[:, 1:].nan_to_num(0, 0, 0).clamp(-furthest, furthest)
    harmless = torch.cat([rois[:, :1], corners[:, :2], torch.maximum(corners[:, :2], corners[:, 2:])], dim=1)
    counts = [len(one) * one.shape[2] * one.shape[3] for one in features]
    layout = [(sum(counts[:level]), *one.shape[2:]) for level, one in enumerate(features)]
    pooled = torch.empty(len(rois), output_size, output_size, channels, dtype=cells.dtype, device=device)
    at_once = triton.next_power_of_2(channels)
    if len(rois):
        _roi_align[(len(rois) * output_size**2,)](
            cells,
            _on_device(tuple(layout), torch.int64, device),
            _on_device(tuple(scales), torch.float32, device),
            harmless.contiguous(),
            levels,
            pooled,
            channels,
            size=output_size,
            samples=sampling_ratio,
            offset=0.5 if aligned else 0.0,
            at_once=at_once,
            num_warps=warps(at_once, cells.element_size()),
        )
    return pooled.permute(0, 3, 1, 2)


def warps(at_once: int, value_bytes: int) -> int:
    """How many warps read so many values of a cell together, 16 bytes a thread. With more, each would read less and
    compute the same addresses.
    """
    return min(max(1, at_once * value_bytes // (32 * 16)), 8)


@cache
def _on_device(values: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A few numbers on the device, copied once. There are as many as sizes of a batch, and a CUDA graph may read them
    at any time, so none is dropped.
    """
    return device_of(device).upload(torch.tensor(values, dtype=dtype))


@triton.jit  # type: ignore[untyped-decorator]  # as all of Triton
def _roi_align(  # type: ignore[no-untyped-def]  # Triton's own
    cells,
    layout,
    scales,
    rois,
    levels,
    pooled,
    channels,
    size: tl.constexpr,
    samples: tl.constexpr,
    offset: tl.constexpr,
    at_once: tl.constexpr,
):
    """One bin of one box, all channels. Addresses are 64-bit because a batch may have more than 2^31 values."""
    program = tl.program_id(0).to(tl.int64)
    row, column, roi = program // size % size, program % size, program // (size * size)
    level = tl.load(levels + roi)
    first_cell = tl.load(layout + 3 * level)
    height, width = tl.load(layout + 3 * level + 1), tl.load(layout + 3 * level + 2)
    scale = tl.load(scales + level)
    image = tl.load(rois + 5 * roi).to(tl.int64)
    x1, y1 = tl.load(rois + 5 * roi + 1) * scale - offset, tl.load(rois + 5 * roi + 2) * scale - offset
    x2, y2 = tl.load(rois + 5 * roi + 3) * scale - offset, tl.load(rois + 5 * roi + 4) * scale - offset
    bin_width, bin_height = (x2 - x1) / size, (y2 - y1) / size
    if offset == 0.0:
        bin_width, bin_height = tl.maximum(x2 - x1, 1.0) / size, tl.maximum(y2 - y1, 1.0) / size
    lanes = tl.arange(0, at_once)
    inside = lanes < channels
    first_cell += image * height * width
    sums = tl.zeros((at_once,), tl.float32)
    if samples > 0:
        rows, columns = samples, samples
        for y_sample in range(samples):
            y = y1 + row * bin_height + (y_sample + 0.5) * bin_height / samples
            for x_sample in range(samples):
                x = x1 + column * bin_width + (x_sample + 0.5) * bin_width / samples
                sums += _sample(cells, first_cell, y, x, height, width, channels, lanes, inside)
    else:
        rows, columns = tl.ceil(bin_height).to(tl.int32), tl.ceil(bin_width).to(tl.int32)
        # `while`, since the interpreter of Triton 3.6 cannot count to a tensor with newer versions of NumPy.
        y_sample = 0
        while y_sample < rows:
            y = y1 + row * bin_height + (y_sample + 0.5) * bin_height / rows
            x_sample = 0
            while x_sample < columns:
                x = x1 + column * bin_width + (x_sample + 0.5) * bin_width / columns
                sums += _sample(cells, first_cell, y, x, height, width, channels, lanes, inside)
                x_sample += 1
            y_sample += 1
    mean = sums / tl.maximum(rows * columns, 1)
    tl.store(pooled + program * channels + lanes, mean.to(pooled.dtype.element_ty), mask=inside)


@triton.jit
def _sample(  # type: ignore[no-untyped-def]  # Triton's own
    cells, first_cell, y, x, height, width, channels, lanes, inside
):
    """One bilinear sample, all channels; 0 beyond the map."""
    sample = tl.zeros_like(lanes).to(tl.float32)
    if (y >= -1.0) & (y <= height) & (x >= -1.0) & (x <= width):
        y_near, x_near = tl.maximum(y, 0.0), tl.maximum(x, 0.0)
        top, left = tl.minimum(y_near.to(tl.int64), height - 1), tl.minimum(x_near.to(tl.int64), width - 1)
        bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
        # On the last row and column there is no cell beyond.
        down, beside = tl.minimum(y_near - top, 1.0), tl.minimum(x_near - left, 1.0)
        upper = cells + (first_cell + top * width) * channels
        lower = cells + (first_cell + bottom * width) * channels
        sample += (1 - down) * (1 - beside) * tl.load(upper + left * channels + lanes, mask=inside, other=0.0)
        sample += (1 - down) * beside * tl.load(upper + right * channels + lanes, mask=inside, other=0.0)
        sample += down * (1 - beside) * tl.load(lower + left * channels + lanes, mask=inside, other=0.0)
        sample += down * beside * tl.load(lower + right * channels + lanes, mask=inside, other=0.0)
    return sample
