"""From pixels to a network's input on CUDA, in Triton: one launch for each image, where PyTorch's operators need six
and write the whole image in float32 four times. Triton comes with PyTorch on Linux; import this module only if Triton
and a GPU are present. Nothing here synchronizes with the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES_AT_ONCE = 1024


def resize_normalise_and_pad(
    images: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    padded_size: tuple[int, int],
    *,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Like `torch.nn.functional.interpolate(…, mode="bilinear", align_corners=False)` on the normalised images.

    Args:
        images: (H, W, 3) uint8 on the GPU, at least one pixel each.
        sizes: each one's (h, w).
        padded_size: (H', W').
        mean: of each channel, for pixels scaled to 0..1.
        std: standard deviation of each channel, likewise.

    Returns:
        (N, 3, H', W') float32 in `torch.channels_last`, each image at the top left, zeros around it.
    """
    height, width = padded_size
    batch = torch.empty(len(images), height, width, 3, dtype=torch.float32, device=images[0].device)
    for image, (resized_height, resized_width), output in zip(images, sizes, batch, strict=True):
        _resize[(triton.cdiv(3 * height * width, _VALUES_AT_ONCE),)](
            image.contiguous(),
            output,
            *image.shape[:2],
            resized_height,
            resized_width,
            height,
            width,
            image.shape[0] / resized_height,
            image.shape[1] / resized_width,
            *mean,
            *std,
            at_once=_VALUES_AT_ONCE,
        )
    return batch.permute(0, 3, 1, 2)


# Without variants for special numbers, which would be compiled within a batch.
@triton.jit(do_not_specialize=["height", "width", "resized_height", "resized_width", "padded_height", "padded_width"])  # type: ignore[untyped-decorator]  # as all of Triton
def _resize(  # type: ignore[no-untyped-def]  # Triton's own
    pixels,
    output,
    height,
    width,
    resized_height,
    resized_width,
    padded_height,
    padded_width,
    y_step,
    x_step,
    red_mean,
    green_mean,
    blue_mean,
    red_std,
    green_std,
    blue_std,
    at_once: tl.constexpr,
):
    """Some values of one image's place in the batch.

    Args:
        pixels: (height, width, 3) uint8.
        output: (padded_height, padded_width, 3) float32, written.
        y_step, x_step: pixels of the image per pixel of the resized one.
    """
    # Channels too lie side by side in the threads, so that neighbours read and write neighbouring bytes.
    places = tl.program_id(0) * at_once + tl.arange(0, at_once)
    exists = places < 3 * padded_height * padded_width
    channel = places % 3
    row, column = places // 3 // padded_width, places // 3 % padded_width
    inside = exists & (row < resized_height) & (column < resized_width)
    mean = tl.where(channel == 0, red_mean, tl.where(channel == 1, green_mean, blue_mean))
    std = tl.where(channel == 0, red_std, tl.where(channel == 1, green_std, blue_std))
    y, x = tl.maximum((row + 0.5) * y_step - 0.5, 0.0), tl.maximum((column + 0.5) * x_step - 0.5, 0.0)
    top, left = tl.minimum(y.to(tl.int32), height - 1), tl.minimum(x.to(tl.int32), width - 1)
    down, beside = tl.minimum(y - top, 1.0), tl.minimum(x - left, 1.0)
    bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
    first = _normalised(pixels + (top * width + left) * 3 + channel, inside, mean, std)
    second = _normalised(pixels + (top * width + right) * 3 + channel, inside, mean, std)
    third = _normalised(pixels + (bottom * width + left) * 3 + channel, inside, mean, std)
    fourth = _normalised(pixels + (bottom * width + right) * 3 + channel, inside, mean, std)
    upper, lower = first * (1 - beside) + second * beside, third * (1 - beside) + fourth * beside
    tl.store(output + places, tl.where(inside, upper * (1 - down) + lower * down, 0.0), mask=exists)


@triton.jit
def _normalised(address, inside, mean, std):  # type: ignore[no-untyped-def]  # Triton's own
    return (tl.load(address, mask=inside, other=0).to(tl.float32) / 255.0 - mean) / std
