"""From the bytes of pictures to a network's input in one pass: resize, normalise and pad. torchvision makes a pass over
the whole picture for each step.

Shapes: N images, H x W an image's pixels, h x w what it is resized to, H' x W' the batch, at least as large as each.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
from numba import prange
from numpy.typing import NDArray
from torch import Tensor

from service.jit import compiled, parallel_loops
from service.ops._kernel_check import kernels_work

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Cells = NDArray[np.uint64]


def resize_normalise_and_pad(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Like `torch.nn.functional.interpolate(…, mode="bilinear", align_corners=False)` on the normalised images.
    `_cuda_resize.py` has the same function for GPUs.

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
            rows, row_weights = _source_cells(image.shape[0], height)
            columns, column_weights = _source_cells(image.shape[1], width)
            pixels = image.contiguous().numpy()
            _resize(pixels, rows, row_weights, columns, column_weights, table, output)
    return batch


@cache
def gpu_resizes_alike(device: torch.device) -> bool:
    """Whether our kernel runs on this GPU and gives the same numbers as the CPU's, up to rounding. It takes two small
    pictures to find out, once.
    """
    numbers = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=numbers) for size in ((37, 53), (90, 61))]
    resize = partial(
        resize_normalise_and_pad,
        sizes=[(60, 86), (81, 55)],
        padded_size=(96, 96),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
    )

    def check() -> bool:
        from service.ops import _cuda_resize

        given = resize.keywords | {"images": [image.to(device) for image in images]}
        return torch.allclose(_cuda_resize.resize_normalise_and_pad(**given).cpu(), resize(images), atol=1e-4)

    return kernels_work(check, device=device, purpose="resizing", instead="PyTorch's, in more steps")


def normalised_bytes(mean: Sequence[float], std: Sequence[float]) -> Floats:
    """(3 * 256,) the normalised value of each byte in each channel, rounded exactly like torchvision."""
    bytes_ = torch.arange(256, dtype=torch.float32).div_(255)
    table: Floats = ((bytes_ - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]).flatten().numpy()
    return table


def _source_cells(length: int, resized: int) -> tuple[Cells, Floats]:
    """Along one axis: for each resized pixel, the source pixel before it and the weight of the one after it."""
    # On long sides the last bit of a position changes the weights, so it is rounded like torch: once, to float32.
    step = np.float64(np.float32(length) / np.float32(resized))
    positions = np.maximum(step * (np.arange(resized) + 0.5) - 0.5, 0).astype(np.float32)
    cells = np.minimum(positions.astype(np.int64), length - 1)
    # Unsigned: a signed index might count from the end, which would prevent vectorized reads.
    return cells.astype(np.uint64), (positions - cells.astype(np.float32)).clip(0, 1)


@compiled(parallel=True)
def _resize(
    pixels: Bytes,
    rows: Cells,
    row_weights: Floats,
    columns: Cells,
    column_weights: Floats,
    table: Floats,
    output: Floats,
) -> None:
    for y in prange(output.shape[1]):
        if y < len(rows):
            below = min(rows[y] + np.uint64(1), np.uint64(len(pixels) - 1))
            mixed = _mix_rows(pixels[rows[y]], pixels[below], row_weights[y], table)
            for channel in range(3):
                _fill_row(mixed[channel:], columns, column_weights, output[channel, y])
        else:
            output[:, y] = 0


@compiled()
def _mix_rows(above: Bytes, below: Bytes, weight: np.float32, table: Floats) -> Floats:
    """Two rows of pixels, normalised and interpolated. The last pixel is repeated, so that each has a successor."""
    mixed = np.empty(3 * len(above) + 3, np.float32)
    for x in range(len(above)):
        for channel in range(3):
            upper = table[np.uint64(256 * channel + above[x, channel])]
            lower = table[np.uint64(256 * channel + below[x, channel])]
            mixed[3 * x + channel] = upper * (np.float32(1) - weight) + lower * weight
    mixed[-3:] = mixed[-6:-3]
    return mixed


@compiled()
def _fill_row(mixed: Floats, columns: Cells, weights: Floats, output: Floats) -> None:
    for x in range(len(columns)):
        before, after = mixed[np.uint64(3) * columns[x]], mixed[np.uint64(3) * columns[x] + np.uint64(3)]
        output[x] = before * (np.float32(1) - weights[x]) + after * weights[x]
    output[len(columns) :] = 0
