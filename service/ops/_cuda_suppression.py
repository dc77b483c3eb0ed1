"""Non-maximum suppression on CUDA, in Triton. Triton comes with PyTorch on Linux; import this module only if Triton and
a GPU are present. Nothing here synchronizes with the device.

Two kernels: the first compares boxes, 64 x 64 at a time on all of the GPU, and packs the results into words of 64 bits;
the second goes through each group in order, one program per group, and needs only these words.

Shapes: K boxes of the whole batch, G groups. A block is 64 consecutive boxes; a group may start and end within one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = tl.constexpr(64)
"""Boxes per word."""
_ROWS_AT_ONCE = 1024
_MOST_BYTES = 1 << 26
"""Memory for comparisons between blocks: 6000 boxes in each of 8 images take 37 MB. If they would take more, they are
not stored but computed when the second kernel needs them, which is slower for large groups and takes 8 bytes a box.
"""


def suppress(
    boxes: Tensor, groups: Tensor, starts: Tensor, iou_threshs: Tensor, *, largest: int, most_bytes: int = _MOST_BYTES
) -> Tensor:
    """Which boxes to keep. They come group by group, best first within each group.

    Args:
        boxes: (K, 4) float32.
        groups: (K,) int64, the group of each box, in ascending order; G for boxes of no group, which are dropped.
        starts: (G + 1,) int64, where each group starts.
        iou_threshs: (G,) float32, overlap above which the worse box is dropped.
        largest: no group has more boxes than this.
        most_bytes: see `_MOST_BYTES`.

    Returns:
        (K,) bool.
    """
    num_boxes, num_groups = len(boxes), len(starts) - 1
    keep = torch.zeros(num_boxes, dtype=torch.int8, device=boxes.device)
    num_blocks = triton.cdiv(num_boxes, _BLOCK.value)
    # A group touches one block more than it fills if it starts within a block.
    distances = min(triton.cdiv(largest, _BLOCK.value) + 1, num_blocks)
    is_stored = distances * num_boxes * 8 <= most_bytes
    overlaps = torch.empty(distances if is_stored else 1, num_boxes, dtype=torch.int64, device=boxes.device)
    boxes = boxes.contiguous()
    # Without fused multiplications, whose results differ in the last digit.
    _compare[(num_blocks, len(overlaps))](
        boxes, groups, starts, iou_threshs, overlaps, num_boxes, num_groups, num_warps=8, enable_fp_fusion=False
    )
    _go_through[(num_groups,)](
        boxes, starts, iou_threshs, overlaps, keep, num_boxes, is_stored, _ROWS_AT_ONCE, enable_fp_fusion=False
    )
    return keep.bool()


@triton.jit
def _words(boxes, rows, ends, iou_threshs, first_column):  # type: ignore[no-untyped-def]  # Triton's own
    """For each of 64 boxes a word: bit i says whether it overlaps box `first_column + i`, if that is a worse one of its
    group.

    Args:
        boxes: (K, 4).
        rows: (64,) the boxes; nothing is read for those that end at 0.
        ends: (64,) where the group of each ends.
        iou_threshs: (64,), or one for all.
        first_column: a multiple of 64.
    """
    bits = tl.arange(0, _BLOCK)
    columns = first_column + bits
    row, column = 4 * rows, 4 * columns
    is_row, is_column = ends > 0, columns < tl.max(ends, 0)
    x1, y1 = tl.load(boxes + row, mask=is_row, other=0.0), tl.load(boxes + row + 1, mask=is_row, other=0.0)
    x2, y2 = tl.load(boxes + row + 2, mask=is_row, other=0.0), tl.load(boxes + row + 3, mask=is_row, other=0.0)
    other_x1 = tl.load(boxes + column, mask=is_column, other=0.0)
    other_y1 = tl.load(boxes + column + 1, mask=is_column, other=0.0)
    other_x2 = tl.load(boxes + column + 2, mask=is_column, other=0.0)
    other_y2 = tl.load(boxes + column + 3, mask=is_column, other=0.0)
    width = tl.minimum(x2[:, None], other_x2[None, :]) - tl.maximum(x1[:, None], other_x1[None, :])
    height = tl.minimum(y2[:, None], other_y2[None, :]) - tl.maximum(y1[:, None], other_y1[None, :])
    overlap = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area, other_area = (x2 - x1) * (y2 - y1), (other_x2 - other_x1) * (other_y2 - other_y1)
    iou = tl.div_rn(overlap, area[:, None] + other_area[None, :] - overlap)
    is_worse = (columns[None, :] > rows[:, None]) & (columns[None, :] < ends[:, None])
    values = tl.full((_BLOCK,), 1, tl.int64) << bits.to(tl.int64)
    return tl.sum(tl.where(is_worse & (iou > iou_threshs), values[None, :], 0), axis=1)


# Without variants for special numbers, which would be compiled within a batch.
@triton.jit(do_not_specialize=["num_boxes", "num_groups"])
def _compare(  # type: ignore[no-untyped-def]  # Triton's own
    boxes, groups, starts, iou_threshs, overlaps, num_boxes, num_groups
):
    """Compare a block of boxes with the block that is `distance` blocks further.

    Args:
        boxes: (K, 4).
        groups: (K,).
        starts: (G + 1,).
        iou_threshs: (G,).
        overlaps: (distances, K) words, written. Only what `_go_through` reads is written.
        num_boxes: K.
        num_groups: G.
    """
    block, distance = tl.program_id(0), tl.program_id(1)
    rows = block * _BLOCK + tl.arange(0, _BLOCK)
    group = tl.load(groups + rows, mask=rows < num_boxes, other=num_groups)
    is_member = group < num_groups
    ends = tl.load(starts + 1 + group, mask=is_member, other=0).to(tl.int32)
    first_column = (block + distance) * _BLOCK
    if first_column < tl.max(ends, 0):
        threshs = tl.load(iou_threshs + group, mask=is_member, other=0.0)
        words = _words(boxes, rows, ends, threshs[:, None], first_column)
        tl.store(overlaps + distance * num_boxes + rows, words, mask=is_member)


@triton.jit(do_not_specialize=["num_boxes"])  # type: ignore[untyped-decorator]  # as all of Triton
def _go_through(  # type: ignore[no-untyped-def]  # Triton's own
    boxes,
    starts,
    iou_threshs,
    overlaps,
    keep,
    num_boxes,
    is_stored: tl.constexpr,
    rows_at_once: tl.constexpr,
):
    """Keep the boxes of one group that overlap no better box that is kept.

    Args:
        boxes: (K, 4).
        starts: (G + 1,).
        iou_threshs: (G,).
        overlaps: (distances, K) words; only those of distance 0 if not `is_stored`.
        keep: (K,) int8, all 0; written.
        num_boxes: K.
        is_stored: whether to read overlaps between blocks, or to compute them.
        rows_at_once: how many are read at a time.
    """
    group = tl.program_id(0)
    start, end = tl.load(starts + group).to(tl.int32), tl.load(starts + group + 1).to(tl.int32)
    thresh = tl.load(iou_threshs + group)
    bits = tl.arange(0, _BLOCK)
    first_of_group = start // _BLOCK * _BLOCK
    first = first_of_group
    # `while`, since the interpreter of Triton 3.6 cannot count to a tensor with newer versions of NumPy.
    while first < end:
        # 1. What kept boxes of earlier blocks overlap. They were written by other threads of this program.
        tl.debug_barrier()
        dropped = tl.full((), 0, tl.int64)
        earlier = first_of_group
        while earlier < first:
            if is_stored:
                rows = earlier + tl.arange(0, rows_at_once)
                is_kept = tl.load(keep + rows, mask=(rows >= start) & (rows < first), other=0) != 0
                distances = first // _BLOCK - rows // _BLOCK
                words = tl.load(overlaps + distances * num_boxes + rows, mask=is_kept, other=0)
                earlier += rows_at_once
            else:
                rows = earlier + bits
                is_kept = tl.load(keep + rows, mask=rows >= start, other=0) != 0
                ends = tl.where(is_kept, end, 0)
                words = _words(boxes, rows, ends, thresh, first)
                earlier += _BLOCK
            dropped |= tl.reduce_or(words, axis=0)
        # 2. What kept boxes of this block overlap in it, in order.
        for bit in tl.static_range(_BLOCK):
            place = first + bit
            word = tl.load(overlaps + place, mask=(place >= start) & (place < end), other=0)
            dropped |= tl.where(((dropped >> bit) & 1) == 0, word, 0)
        places = first + bits
        is_kept = ((dropped >> bits.to(tl.int64)) & 1) == 0
        tl.store(keep + places, is_kept.to(tl.int8), mask=(places >= start) & (places < end))
        first += _BLOCK
