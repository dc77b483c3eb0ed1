"""RoI Align and RoI Pool over all feature levels at once, on the CPU, for channels-last features without gradients: for
inference, not for training. The boxes are divided among threads; the innermost loop runs over the channels, which are
contiguous in memory. Results equal those of torchvision's kernels level by level, up to the order of summation.

Shapes: N images, K boxes of the whole batch, C channels, H x W cells of a level, h x w output size. A cell is one
element of a feature map, `1 / scale` image pixels wide.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray
from torch import Tensor

from service.jit import compiled, parallel_loops

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

# 32 rows of cells on the finest map: a core's cache then holds a roughly square block of them.
_STRIP_HEIGHT_PIXELS = 128

# For each of two outputs: enough for the boxes of one image on a wide pyramid.
_MOST_BYTES_KEPT = 64 * 2**20


class OutputMemory:
    """Memory for a kernel's outputs, reused once nothing refers to the old contents: with a thousand boxes, allocating
    fresh memory page by page takes a sixth of the kernel's time. Not thread-safe.
    """

    def __init__(self) -> None:
        # Two, since OpenVINO's requests hold their last input until they get the next one.
        self._kept: deque[Floats] = deque(maxlen=2)

    def take(self, shape: tuple[int, ...]) -> Floats:
        """An uninitialised float32 array."""
        length = math.prod(shape)
        for index in range(len(self._kept)):
            # One reference is the deque's, one is the argument's; a third means that an output is still in use.
            if len(self._kept[index]) >= length and sys.getrefcount(self._kept[index]) == 2:
                return self._kept[index][:length].reshape(shape)
        fresh = np.empty(length, np.float32)
        if fresh.nbytes <= _MOST_BYTES_KEPT:
            self._kept.append(fresh)
        return fresh.reshape(shape)


def multi_scale_roi_align_channels_last(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    *,
    memory: OutputMemory | None = None,
) -> Tensor:
    """Average each bin of each box over bilinear samples, as `torchvision.ops.roi_align` does on the box's level.

    Args:
        features: (N, C, H, W) float32 for each level; fastest in `torch.channels_last`, else copied to it.
        rois: (K, 5) float32 as (image index, x1, y1, x2, y2), finite, in image pixels.
        levels: (K,) int64, each box's index in `features`.
        scales: cells per image pixel of each level.
        output_size: (h, w).
        sampling_ratio: samples along each side of a bin; 0 for as many as the bin has cells.
        aligned: whether pixel centers, not corners, have whole coordinates.
        memory: where to put the result; fresh memory if None.

    Returns:
        (K, C, h, w) float32 in `torch.channels_last`.
    """
    kernel = partial(_roi_align, sampling_ratio=sampling_ratio, aligned=aligned)
    return _over_levels(kernel, features, rois, levels, scales, output_size, memory)


def multi_scale_roi_pool_channels_last(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    *,
    memory: OutputMemory | None = None,
) -> Tensor:
    """Take the maximum of each bin's cells, as `torchvision.ops.roi_pool` does; arguments and result as above."""
    return _over_levels(_roi_pool, features, rois, levels, scales, output_size, memory)


def _over_levels(
    kernel: Callable[[Floats, Floats, Ints, np.float32, Floats], None],
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    memory: OutputMemory | None,
) -> Tensor:
    pooled = (memory or OutputMemory()).take((len(rois), *output_size, features[0].shape[1]))
    table = rois.contiguous().numpy()
    order = _neighbours_together(table)
    levels_in_order = levels.numpy()[order]
    with parallel_loops():
        for level, (feature, scale) in enumerate(zip(features, scales, strict=True)):
            cells = feature.detach().permute(0, 2, 3, 1).contiguous().numpy()
            kernel(cells, table, order[levels_in_order == level], np.float32(scale), pooled)
    return torch.from_numpy(pooled).permute(0, 3, 1, 2)


def _neighbours_together(rois: Floats) -> Ints:
    """(K,) an order that puts boxes sharing cells next to each other, so that the cells are still in the cache: reading
    them takes most of the time. Image by image, strip by strip, left to right.
    """
    images, x1, y1, x2, y2 = rois.T
    return np.lexsort((x1 + x2, (y1 + y2) // (2 * _STRIP_HEIGHT_PIXELS), images))


@compiled(parallel=True)
def _roi_align(
    feature: Floats, rois: Floats, rows: Ints, scale: np.float32, pooled: Floats, sampling_ratio: int, aligned: bool
) -> None:
    for i in prange(len(rows)):
        roi = rois[rows[i]]
        _align_box(feature[int(roi[0])], roi[1:] * scale, pooled[rows[i]], sampling_ratio, aligned)


@compiled()
def _align_box(image: Floats, box: Floats, output: Floats, sampling_ratio: int, aligned: bool) -> None:
    x1, y1, x2, y2 = box - np.float32(0.5 if aligned else 0)
    y_first, ys, y_weights = _bin_weights(y1, y2, output.shape[0], image.shape[0], sampling_ratio, aligned)
    x_first, xs, x_weights = _bin_weights(x1, x2, output.shape[1], image.shape[1], sampling_ratio, aligned)
    output[:] = 0
    for row in range(output.shape[0]):
        for column in range(output.shape[1]):
            sums = output[row, column]
            for y in range(y_first[row], y_first[row + 1]):
                for x in range(x_first[column], x_first[column + 1]):
                    weight, cell = y_weights[y] * x_weights[x], image[ys[y], xs[x]]
                    for channel in range(len(sums)):
                        sums[channel] += weight * cell[channel]


@compiled()
def _bin_weights(
    start: np.float32, end: np.float32, bins: int, limit: int, sampling_ratio: int, aligned: bool
) -> tuple[Ints, Ints, Floats]:
    """Along one axis: which cells each bin averages, and with what weights.

    The mean over a grid of bilinear samples is the product of two such lists, one per axis; samples that share a cell
    are merged.

    Returns:
        first: (bins + 1,) bin b owns entries `first[b]` to `first[b + 1]` of the other two arrays.
        cells: their indices, in [0, limit).
        weights: their weights, which sum to 1 for a bin inside the map.
    """
    length = end - start if aligned else max(end - start, np.float32(1))
    bin_length = length / np.float32(bins)
    samples = sampling_ratio if sampling_ratio > 0 else max(math.ceil(bin_length), 0)
    first = np.zeros(bins + 1, np.int64)
    cells, weights = np.empty(2 * bins * samples, np.int64), np.zeros(2 * bins * samples, np.float32)
    count = 0
    for b in range(bins):
        for sample in range(samples):
            # Rounded step by step like torchvision: far from the origin the last bit changes the weights.
            within = (np.float32(sample) + np.float32(0.5)) * bin_length / np.float32(samples)
            position = start + np.float32(b) * bin_length + within
            if not np.float32(-1) <= position <= np.float32(limit):
                continue
            position = max(position, np.float32(0))
            low = min(int(position), limit - 1)
            far = position - np.float32(low) if low + 1 < limit else np.float32(0)
            count = _add_weight(low, (np.float32(1) - far) / np.float32(samples), cells, weights, first[b], count)
            if far > 0:
                count = _add_weight(low + 1, far / np.float32(samples), cells, weights, first[b], count)
        first[b + 1] = count
    return first, cells[:count], weights[:count]


@compiled()
def _add_weight(cell: int, weight: np.float32, cells: Ints, weights: Floats, first: int, count: int) -> int:
    # Samples advance in one direction, so only the last two entries can be for the same cell.
    for entry in range(max(first, count - 2), count):
        if cells[entry] == cell:
            weights[entry] += weight
            return count
    cells[count], weights[count] = cell, weight
    return count + 1


@compiled(parallel=True)
def _roi_pool(feature: Floats, rois: Floats, rows: Ints, scale: np.float32, pooled: Floats) -> None:
    for i in prange(len(rows)):
        roi = rois[rows[i]]
        _pool_box(feature[int(roi[0])], roi[1:] * scale, pooled[rows[i]])


@compiled()
def _pool_box(image: Floats, box: Floats, output: Floats) -> None:
    y_starts, y_ends = _bin_bounds(box[1], box[3], output.shape[0], image.shape[0])
    x_starts, x_ends = _bin_bounds(box[0], box[2], output.shape[1], image.shape[1])
    for row in range(output.shape[0]):
        for column in range(output.shape[1]):
            largest = output[row, column]
            is_empty = y_starts[row] >= y_ends[row] or x_starts[column] >= x_ends[column]
            largest[:] = np.float32(0) if is_empty else np.finfo(np.float32).min
            for y in range(y_starts[row], y_ends[row]):
                for x in range(x_starts[column], x_ends[column]):
                    cell = image[y, x]
                    for channel in range(len(largest)):
                        largest[channel] = max(largest[channel], cell[channel])


@compiled()
def _bin_bounds(start: np.float32, end: np.float32, bins: int, limit: int) -> tuple[Ints, Ints]:
    """Along one axis: the first cell of each bin and the one past its last, in [0, limit]. Bins may share a cell."""
    first = _round_half_away(start)
    bin_length = np.float32(max(_round_half_away(end) - first + 1, 1)) / np.float32(bins)
    starts, ends = np.empty(bins, np.int64), np.empty(bins, np.int64)
    for b in range(bins):
        starts[b] = min(max(first + math.floor(np.float32(b) * bin_length), 0), limit)
        ends[b] = min(max(first + math.ceil(np.float32(b + 1) * bin_length), 0), limit)
    return starts, ends


@compiled()
def _round_half_away(value: np.float32) -> int:
    """C's `round`: Python's and numpy's round halves to even."""
    return int(math.copysign(math.floor(abs(float(value)) + 0.5), value))
