"""Masks and boxes such as a mask head gives, and the references that paste them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torchvision.models.detection.roi_heads import paste_masks_in_image

from service.structures import Float32Array, UInt8Array


def objects(seed: int, image_size: tuple[int, int], number: int = 12) -> tuple[Float32Array, Float32Array]:
    """Blobs with a few parts and holes, some hard-edged, in boxes of any size, whole or not, that may reach outside."""
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.normal(size=(number, 1, 6, 6)))
    masks = torch.nn.functional.interpolate(noise, size=(28, 28), mode="bicubic")[:, 0].mul(4).sigmoid().numpy()
    masks[::3] = masks[::3] > 0.5
    extent = np.array([image_size[1], image_size[0]])
    # torchvision fails on boxes that lie outside altogether, so the centers are inside.
    centers, sides = rng.random((number, 2)) * extent, 1 + rng.random((number, 2)) ** 2 * extent * 1.5
    boxes = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    boxes[::2] = boxes[::2].round()
    return masks.astype(np.float32), boxes.astype(np.float32)


def pasted(masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int], threshold: float = 0.5) -> UInt8Array:
    """(D, H, W): the reference."""
    canvases = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), image_size, padding=1)
    pixels: UInt8Array = (canvases[:, 0] >= threshold).numpy().astype(np.uint8)
    return pixels


def sampled(masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int]) -> NDArray[np.float64]:
    """(D, H, W) probabilities: detectron2's `paste_masks_in_image` in float64, without its loop over objects."""
    height, width = image_size
    corners = torch.from_numpy(boxes).double()[:, :, None]
    x = (torch.arange(width, dtype=torch.float64) + 0.5 - corners[:, 0]) / (corners[:, 2] - corners[:, 0]) * 2 - 1
    y = (torch.arange(height, dtype=torch.float64) + 0.5 - corners[:, 1]) / (corners[:, 3] - corners[:, 1]) * 2 - 1
    shape = (len(boxes), height, width)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=3)
    canvases = functional.grid_sample(torch.from_numpy(masks)[:, None].double(), grid, align_corners=False)
    probabilities: NDArray[np.float64] = canvases[:, 0].numpy()
    return probabilities


def drawn(picture: list[str]) -> tuple[Float32Array, Float32Array, tuple[int, int]]:
    """One object whose pixels are the `#` of a square picture: a mask of its size in a box that maps pixel to pixel."""
    mask = np.array([[character == "#" for character in row] for row in picture], np.float32)
    side = len(mask)
    # Padded by a pixel on each side the mask covers pixels -1 to side; the 0.25 keeps truncation away from rounding.
    center, half = (side - 1) / 2, ((side + 1) / 2 + 0.25) * side / (side + 2)
    box = [center - half, center - half, center + half, center + half]
    return mask[None], np.array([box], np.float32), (side, side)
