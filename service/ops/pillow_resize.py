"""Resize pictures to the same bytes as Pillow's `resize(…, BILINEAR)`, which detectron2 uses: a triangle filter in
whole numbers, as wide as a new pixel where the picture shrinks, first along the rows and then along the columns.

Source: `src/libImaging/Resample.c` of Pillow up to 12. Pillow 13 begins with the columns if a picture loses far more
height than width, which moves some bytes of tall pictures by 1; detectron2's models were trained before.

Shapes: N images, H x W an image's pixels, h x w what it is resized to, H' x W' the batch, at least as large as each, T
the number of pixels under the filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray
from torch import Tensor

from service.devices import device_of
from service.jit import compiled, parallel_loops
from service.ops.resize import normalised_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int32]

# Weights are multiples of 2^-22: with two bits to spare a sum of 255s fits into 32 bits.
_BITS = 22
_HALF = np.int32(1 << (_BITS - 1))


def resize_bytes(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image on any device.

    Args:
        image: (H, W, C) uint8.
        size: (h, w).

    Returns:
        (h, w, C) uint8.
    """
    for dim, length in ((1, size[1]), (0, size[0])):
        if image.shape[dim] != length:
            image = _resize_axis(image, dim, length)
    return image


def _resize_axis(image: Tensor, dim: int, length: int) -> Tensor:
    upload = device_of(image.device).upload
    firsts, weights = _filter(image.shape[dim], length)
    taps = firsts[:, None] + np.arange(weights.shape[1])
    indices = upload(torch.from_numpy(np.minimum(taps, image.shape[dim] - 1).T.copy()))
    factors = upload(torch.from_numpy(weights.T.copy()))
    shape = [-1 if axis == dim else 1 for axis in range(image.ndim)]
    total = torch.full((), int(_HALF), dtype=torch.int32, device=image.device)
    for index, factor in zip(indices, factors, strict=True):
        total = total + image.index_select(dim, index).int() * factor.reshape(shape)
    return (total >> _BITS).to(torch.uint8)


def pillow_resize_normalise_and_pad(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """`resize_bytes`, then normalise and pad, in two passes on the CPU.

    Args:
        images: (H, W, 3) uint8 on the CPU, at least one pixel each.
        sizes: each one's (h, w).
        padded_size: (H', W').
        mean: of each channel, for pixels scaled to 0..1.
        std: standard deviation of each channel, likewise.

    Returns:
        (N, 3, H', W') float32, each image at the top left, zeros around it.
    """
    batch = torch.empty(len(images), 3, *padded_size)
    table = normalised_bytes(mean, std)
    with parallel_loops():
        for image, (height, width), output in zip(images, sizes, batch.numpy(), strict=True):
            pixels: Bytes = image.contiguous().numpy()
            if pixels.shape[1] != width:
                narrowed = np.empty((len(pixels), width, 3), np.uint8)
                _resize_rows(pixels, *_filter(pixels.shape[1], width), narrowed)
                pixels = narrowed
            _resize_columns(pixels.reshape(len(pixels), -1), *_filter(len(pixels), height), table, output)
    return batch


@lru_cache(maxsize=64)
def _filter(length: int, resized: int) -> tuple[Numbers, Numbers]:
    """Along one axis: for each new pixel the first source pixel under its filter, (resized,), and the weights from
    there on, (resized, T), 0 behind the last one. Pillow's `precompute_coeffs` and `normalize_coeffs_8bpc`.
    """
    scale = length / resized
    support = max(scale, 1.0)  # of the triangle, to each side
    centers = (np.arange(resized) + 0.5) * scale
    # As in C, `astype` truncates towards zero.
    firsts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + support + 0.5).astype(np.int64), length)
    taps = firsts[:, None] + np.arange(math.ceil(support) * 2 + 1)
    distances = np.abs((taps - centers[:, None] + 0.5) * (1.0 / support))
    weights = np.where(taps < ends[:, None], np.maximum(1.0 - distances, 0.0), 0.0)
    # Summed one by one, since the last bit of a sum may decide how a weight is rounded.
    weights /= weights.cumsum(axis=1)[:, -1:]
    used = np.flatnonzero(weights.any(axis=0))[-1] + 1
    return firsts.astype(np.int32), (weights[:, :used] * (1 << _BITS) + 0.5).astype(np.int32)


@compiled(parallel=True)
def _resize_rows(pixels: Bytes, firsts: Numbers, weights: Numbers, output: Bytes) -> None:
    for y in prange(len(output)):
        row = pixels[y]
        for x in range(len(firsts)):
            red, green, blue = _HALF, _HALF, _HALF
            first, count = firsts[x], min(weights.shape[1], len(row) - firsts[x])
            for tap in range(count):
                weight, place = weights[x, tap], first + tap
                red += np.int32(row[place, 0]) * weight
                green += np.int32(row[place, 1]) * weight
                blue += np.int32(row[place, 2]) * weight
            output[y, x, 0] = red >> _BITS
            output[y, x, 1] = green >> _BITS
            output[y, x, 2] = blue >> _BITS


@compiled(parallel=True)
def _resize_columns(pixels: Bytes, firsts: Numbers, weights: Numbers, table: Floats, output: Floats) -> None:
    for y in prange(output.shape[1]):
        if y < len(firsts):
            total = np.full(pixels.shape[1], _HALF, np.int32)
            for tap in range(min(weights.shape[1], len(pixels) - firsts[y])):
                _add_row(total, pixels[firsts[y] + tap], weights[y, tap])
            for channel in range(3):
                _fill_row(total[channel:], table[256 * channel : 256 * channel + 256], output[channel, y])
        else:
            output[:, y] = 0


@compiled()
def _add_row(total: Numbers, row: Bytes, weight: np.int32) -> None:
    for i in range(len(row)):
        total[i] += np.int32(row[i]) * weight


@compiled()
def _fill_row(total: Numbers, table: Floats, output: Floats) -> None:
    width = (len(total) + 2) // 3
    for x in range(width):
        output[x] = table[np.uint8(total[3 * x] >> _BITS)]
    output[width:] = 0
