"""Proposals and suppression on the CPU: an RPN's outputs to its proposals in one pass over the levels, and non-maximum
suppression group by group.

Shapes: N images, L levels, A anchors of all levels of an image, T anchors that are the best of their level. Boxes are
(x1, y1, x2, y2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray
from torch import Tensor

from service.jit import compiled, parallel_loops

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Unsigned = NDArray[np.uint32]
Bools = NDArray[np.bool_]

MOST_BOXES_MOVED = 1000
"""Up to this many boxes of an image, torchvision offsets them by class (an RPN's by level) and suppresses all at once.
The offset costs precision, so matching its results requires the same offset.
"""

_DIGIT_BITS = 11


def choose_proposals(
    objectness: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    *,
    counts: Sequence[int],
    image_sizes: Sequence[tuple[int, int]],
    pre_nms_top_n: int,
    post_nms_top_n: int,
    weights: Sequence[float],
    largest_stretch: float,
    min_size: float,
    score_thresh: float,
    iou_thresh: np.float32,
) -> list[Tensor]:
    """The steps of torchvision's `RegionProposalNetwork.filter_proposals`, with the same results up to the rounding of
    exponentials. Equal logits keep the order of their anchors.

    Args:
        objectness: (N, A) float32 logits.
        deltas: (N, A, 4) float32 as (dx, dy, dw, dh).
        anchors: (A, 4) float32.
        counts: (L,) anchors of each level.
        image_sizes: (height, width) of each image; boxes are clipped to it.
        pre_nms_top_n: at most this many anchors of a level.
        post_nms_top_n: at most this many proposals of an image.
        weights: of (dx, dy, dw, dh).
        largest_stretch: limit on dw and dh.
        min_size: boxes with a shorter side are dropped.
        score_thresh: and those with a lower probability.
        iou_thresh: overlap above which the worse of two boxes of a level is dropped.

    Returns:
        (K, 4) float32 for each image, best first.
    """
    bounds = np.concatenate([[0], np.cumsum(counts)])
    tops = np.concatenate([[0], np.cumsum([min(count, pre_nms_top_n) for count in counts])])
    num_images, num_best = len(objectness), int(tops[-1])
    sides = np.empty((num_images, 4, num_best), np.float32)
    scores = np.empty((num_images, num_best), np.float32)
    keep = np.empty((num_images, num_best), np.bool_)
    chosen = np.empty((num_images, min(post_nms_top_n, num_best), 4), np.float32)
    chosen_counts = np.empty(num_images, np.int64)
    with parallel_loops():
        _decode_best(
            objectness.contiguous().numpy(),
            deltas.contiguous().numpy(),
            anchors.numpy(),
            bounds,
            tops,
            np.array(image_sizes, np.float32),
            np.array(weights, np.float32),
            np.float32(largest_stretch),
            np.float32(min_size),
            np.float32(score_thresh),
            sides,
            scores,
            keep,
        )
        _suppress_levels(sides, tops, iou_thresh, keep)
    _merge_levels(sides, scores, keep, tops, chosen, chosen_counts)
    return [
        torch.from_numpy(image_boxes[:count]) for image_boxes, count in zip(chosen, chosen_counts.tolist(), strict=True)
    ]


@compiled(divides_by_zero=True)
def suppress_groups(sides: Floats, starts: Ints, iou_threshs: Floats, keep: Bools) -> None:
    """Keep the boxes of each group that overlap no better one.

    Args:
        sides: (4, K) x1, y1, x2 and y2, group by group, best first.
        starts: (G + 1,) where each group starts.
        iou_threshs: (G,) of each group.
        keep: (K,) the result; False beyond the last group.
    """
    keep[: starts[-1]] = True
    for group in range(len(starts) - 1):
        start, end = starts[group], starts[group + 1]
        x1, y1, x2, y2 = sides[0, start:end], sides[1, start:end], sides[2, start:end], sides[3, start:end]
        _suppress(x1, y1, x2, y2, iou_threshs[group], keep[start:end])


@compiled(divides_by_zero=True)
def _suppress(x1: Floats, y1: Floats, x2: Floats, y2: Floats, iou_thresh: np.float32, keep: Bools) -> None:
    """Drop boxes that overlap a better one that is kept; best first."""
    areas = (x2 - x1) * (y2 - y1)
    for best in range(len(keep)):
        if keep[best]:
            # Without a branch, and from 0 over slices: otherwise numba handles negative indices in each step, and the
            # loop takes twelve times as long.
            left, top, right, bottom, area = x1[best], y1[best], x2[best], y2[best], areas[best]
            lefts, tops, rights, bottoms = x1[best + 1 :], y1[best + 1 :], x2[best + 1 :], y2[best + 1 :]
            other_areas, are_kept = areas[best + 1 :], keep[best + 1 :]
            for other in range(len(are_kept)):
                width = min(right, rights[other]) - max(left, lefts[other])
                height = min(bottom, bottoms[other]) - max(top, tops[other])
                overlap = max(width, np.float32(0)) * max(height, np.float32(0))
                are_kept[other] &= not overlap / (area + other_areas[other] - overlap) > iou_thresh


@compiled(parallel=True, divides_by_zero=True)
def _decode_best(
    objectness: Floats,
    deltas: Floats,
    anchors: Floats,
    bounds: Ints,
    tops: Ints,
    image_sizes: Floats,
    weights: Floats,
    largest_stretch: np.float32,
    min_size: np.float32,
    score_thresh: np.float32,
    sides: Floats,
    scores: Floats,
    keep: Bools,
) -> None:
    """Each level's best anchors by logit: the sides of their boxes, their scores, and whether they may be proposals."""
    num_levels = len(tops) - 1
    for task in prange(len(objectness) * num_levels):
        image, level = task // num_levels, task % num_levels
        start, top = bounds[level], tops[level]
        logits = objectness[image, start : bounds[level + 1]]
        height, width = image_sizes[image]
        for place in _largest(logits, tops[level + 1] - top):
            score = np.float32(1) / (np.float32(1) + np.float32(math.exp(-logits[place])))
            is_valid = score >= score_thresh
            for axis, limit in enumerate((width, height)):
                low, high = _decode(
                    deltas[image, start + place], anchors[start + place], axis, weights, largest_stretch
                )
                low, high = min(max(low, np.float32(0)), limit), min(max(high, np.float32(0)), limit)
                sides[image, axis, top], sides[image, 2 + axis, top] = low, high
                is_valid &= high - low >= min_size
            scores[image, top], keep[image, top] = score, is_valid
            top += 1


@compiled()
def _largest(values: Floats, count: int) -> Ints:
    """The places of the largest values, largest first; of equal values the first. NaN counts as larger than all."""
    keys = np.empty(len(values), np.uint32)
    for place, bits in enumerate(values.view(np.uint32)):
        # Unsigned integers in the same order: flip all bits of negative numbers, the sign of others.
        keys[place] = ~bits if bits >> np.uint32(31) else bits | np.uint32(1 << 31)
    least, spare = _kth_largest(keys, count)
    ranked = np.empty(count, np.uint64)
    found = 0
    for place in range(len(keys)):
        key = keys[place]
        if key > least or (key == least and spare > 0):
            spare -= np.int64(key == least)
            ranked[found] = (np.uint64(~key) << np.uint64(32)) | np.uint64(place)
            found += 1
    ranked.sort()
    return (ranked & np.uint64(0xFFFFFFFF)).astype(np.int64)


@compiled()
def _kth_largest(keys: Unsigned, count: int) -> tuple[np.uint32, np.int64]:
    """The `count`-th largest key, and how many keys of that value are among the `count` largest. Digit by digit."""
    digits = 1 << _DIGIT_BITS
    prefix = np.uint32(0)
    known = np.uint32(0)  # mask of the bits found so far
    left = np.int64(count)
    for shift in (21, 10, 0):
        bits = _DIGIT_BITS if shift > 0 else 10
        totals = np.zeros(digits, np.int64)
        for key in keys:
            if key & known == prefix:
                totals[(key >> np.uint32(shift)) & np.uint32((1 << bits) - 1)] += 1
        digit = (1 << bits) - 1
        while totals[digit] < left:
            left -= totals[digit]
            digit -= 1
        prefix |= np.uint32(digit) << np.uint32(shift)
        known |= np.uint32((1 << bits) - 1) << np.uint32(shift)
    return prefix, left


@compiled()
def _decode(
    delta: Floats, anchor: Floats, axis: int, weights: Floats, largest_stretch: np.float32
) -> tuple[np.float32, np.float32]:
    """Where the box begins and ends along an axis, 0 for x and 1 for y."""
    length = anchor[2 + axis] - anchor[axis]
    center = delta[axis] / weights[axis] * length + (anchor[axis] + np.float32(0.5) * length)
    stretch = min(delta[2 + axis] / weights[2 + axis], largest_stretch)
    half = np.float32(0.5) * (np.float32(math.exp(stretch)) * length)
    return center - half, center + half


@compiled(parallel=True, divides_by_zero=True)
def _suppress_levels(sides: Floats, tops: Ints, iou_thresh: np.float32, keep: Bools) -> None:
    num_levels = len(tops) - 1
    steps = np.zeros(len(sides), np.float32)
    for image in range(len(sides)):
        valid = 0
        furthest = np.float32(0)
        for row in range(keep.shape[1]):
            if keep[image, row]:
                valid += 1
                furthest = max(furthest, sides[image, 2, row], sides[image, 3, row])
        if valid <= MOST_BOXES_MOVED:
            steps[image] = furthest + np.float32(1)
    for task in prange(len(sides) * num_levels):
        image, level = task // num_levels, task % num_levels
        start, end = tops[level], tops[level + 1]
        step = np.float32(level) * steps[image]
        _suppress(
            sides[image, 0, start:end] + step,
            sides[image, 1, start:end] + step,
            sides[image, 2, start:end] + step,
            sides[image, 3, start:end] + step,
            iou_thresh,
            keep[image, start:end],
        )


@compiled()
def _merge_levels(sides: Floats, scores: Floats, keep: Bools, tops: Ints, chosen: Floats, counts: Ints) -> None:
    """The best of what is kept of all levels; of equal scores the finer level's first."""
    for image in range(len(sides)):
        next_rows = tops[:-1].copy()
        count = 0
        while count < chosen.shape[1]:
            best = -1
            for level in range(len(next_rows)):
                row = next_rows[level]
                while row < tops[level + 1] and not keep[image, row]:
                    row += 1
                next_rows[level] = row
                if row < tops[level + 1] and (best < 0 or scores[image, row] > scores[image, next_rows[best]]):
                    best = level
            if best < 0:
                break
            for side in range(4):
                chosen[image, count, side] = sides[image, side, next_rows[best]]
            next_rows[best] += 1
            count += 1
        counts[image] = count
