"""Augmentation: make a square training picture from a sample, at the scale the network will see. One affine map does
scale, flips, quarter turns and the crop at once, for pixels and masks alike.

Shapes: S x S the training picture, K objects in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from service.structures import Float32Array, Int64Array, UInt8Array
from service.training.dataset import ObjectMask, Sample

MIN_VISIBLE = 0.3
"""An object is dropped if less than this share of it is left after cropping."""
MIN_SIDE_PIXELS = 2.0


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly to change pictures.

    Attributes:
        crop_size: S, the side of the square crop, in pixels of the resized image.
        scale_range: factors around the scale that serving uses, drawn log-uniformly.
        flips: whether to mirror left-right and top-bottom, and to rotate by multiples of 90 degrees.
        colour: strength of brightness, contrast, gamma and saturation changes, 0 (none) to 1.
        noise: largest standard deviation of added Gaussian noise, in grey levels of 255.
        blur: largest standard deviation of a Gaussian blur, in pixels.
    """

    crop_size: int
    scale_range: tuple[float, float]
    flips: bool
    colour: float
    noise: float
    blur: float


@dataclass(frozen=True, slots=True, eq=False)
class TrainingPicture:
    """Pixels (S, S, 3) uint8 RGB; boxes (K, 4) float32; labels (K,) int64; masks (K, S, S) uint8 or None; proposals
    (L, 4) float32 or None.
    """

    pixels: UInt8Array
    boxes: Float32Array
    labels: Int64Array
    masks: UInt8Array | None
    proposals: Float32Array | None = None


def augment(
    sample: Sample,
    *,
    scale: float,
    augmentation: Augmentation,
    fill: tuple[float, float, float],
    rng: np.random.Generator,
    proposals: Float32Array | None = None,
) -> TrainingPicture:
    """Cut a random training picture from a sample.

    Args:
        sample: the image and its objects.
        scale: resized pixels per stored pixel when this image is served.
        augmentation: how strongly to change it.
        fill: RGB (0 to 255) outside the image: the mean, which becomes 0 after normalisation, like padding.
        rng: the only source of randomness.
        proposals: (L, 4) in pixels of the stored image, transformed with the image; None for a network that makes its
            own.
    """
    size = augmentation.crop_size
    low, high = np.log(augmentation.scale_range)
    matrix = _random_affine(sample, scale * float(np.exp(rng.uniform(low, high))), augmentation, rng)
    pixels = cv2.warpAffine(
        sample.read_pixels(),
        _to_pixel_centres(matrix),
        (size, size),
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=fill,
    )
    boxes = _transform_boxes(sample.boxes, matrix)
    clipped = np.clip(boxes, 0, size)
    keep = _is_visible(boxes, clipped)
    masks = None
    if sample.segmentations is not None:
        objects = sample.read_masks()
        masks = np.zeros((int(keep.sum()), size, size), dtype=np.uint8)
        for target, index in zip(masks, np.flatnonzero(keep), strict=True):
            _draw_mask(objects[index], matrix, clipped[index], target)
        # An object whose box is in the crop but whose pixels are not is removed from both.
        drawn = masks.any(axis=(1, 2))
        masks, keep[keep] = masks[drawn], drawn
    return TrainingPicture(
        pixels=_change_colours(np.asarray(pixels, dtype=np.uint8), augmentation, rng),
        boxes=clipped[keep],
        labels=sample.labels[keep],
        masks=masks,
        proposals=None if proposals is None else _transform_proposals(proposals, matrix, size),
    )


def _random_affine(
    sample: Sample, scale: float, augmentation: Augmentation, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(2, 3) matrix from the stored image to the training picture, both with pixel corners at integers."""
    height, width = sample.image_size
    linear = np.eye(2) * scale
    if augmentation.flips:
        linear = np.linalg.matrix_power(np.array([[0.0, -1.0], [1.0, 0.0]]), int(rng.integers(4))) @ linear
        linear = np.diag([rng.choice([-1.0, 1.0]), 1.0]) @ linear
    corners = linear @ np.array([[0, width, 0, width], [0, 0, height, height]])
    low, extent = corners.min(axis=1), np.ptp(corners, axis=1)
    # Per axis, place the crop at random within the image, or the image within the crop if the image is smaller.
    slack = extent - augmentation.crop_size
    offset = low + rng.uniform(np.minimum(slack, 0), np.maximum(slack, 0))
    return np.hstack([linear, -offset[:, None]])


def _transform_boxes(boxes: Float32Array, matrix: NDArray[np.float64]) -> Float32Array:
    corners = np.stack([boxes[:, :2], boxes[:, 2:]], axis=1) @ matrix[:, :2].T + matrix[:, 2]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)


def _transform_proposals(proposals: Float32Array, matrix: NDArray[np.float64], size: int) -> Float32Array:
    """The proposals that overlap the picture, clipped to it."""
    clipped = np.clip(_transform_boxes(proposals, matrix), 0, size)
    sides = clipped[:, 2:] - clipped[:, :2]
    visible: Float32Array = clipped[sides.min(axis=1) >= MIN_SIDE_PIXELS]
    return visible


def _is_visible(boxes: Float32Array, clipped: Float32Array) -> NDArray[np.bool_]:
    sides, left = boxes[:, 2:] - boxes[:, :2], clipped[:, 2:] - clipped[:, :2]
    visible = left.prod(axis=1) >= MIN_VISIBLE * sides.prod(axis=1)
    return np.asarray(visible & (left.min(axis=1, initial=np.inf) >= MIN_SIDE_PIXELS))


def _draw_mask(mask: ObjectMask, matrix: NDArray[np.float64], box: Float32Array, target: UInt8Array) -> None:
    """Warp one object's bitmap into its box of the (S, S) target."""
    x1, y1 = np.floor(box[:2]).astype(int)
    x2, y2 = np.ceil(box[2:]).astype(int)
    shift = matrix[:, 2] + matrix[:, :2] @ np.array([mask.x, mask.y]) - np.array([x1, y1])
    local = np.hstack([matrix[:, :2], shift[:, None]])
    target[y1:y2, x1:x2] = cv2.warpAffine(mask.bitmap * 255, _to_pixel_centres(local), (x2 - x1, y2 - y1)) > 127


def _to_pixel_centres(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Convert to OpenCV's convention: it has pixel centres at integers, ours are at integers + 0.5."""
    shift = matrix[:, :2] @ np.array([0.5, 0.5]) - 0.5
    return np.hstack([matrix[:, :2], matrix[:, 2:] + shift[:, None]])


def _change_colours(pixels: UInt8Array, augmentation: Augmentation, rng: np.random.Generator) -> UInt8Array:
    values: NDArray[Any] = pixels.astype(np.float32) / 255
    strength = augmentation.colour
    if strength:
        grey = values.mean(axis=2, keepdims=True)
        values = grey + (values - grey) * float(np.exp(rng.uniform(-0.7, 0.7) * strength))
        values = np.clip(values, 0, 1) ** np.float32(np.exp(rng.uniform(-0.5, 0.5) * strength))
        gain = np.exp(rng.uniform(-0.5, 0.5) * strength) * np.exp(rng.uniform(-0.1, 0.1, size=3) * strength)
        values = values * gain.astype(np.float32) + np.float32(rng.uniform(-0.05, 0.05) * strength)
    if augmentation.blur and rng.random() < 0.3:
        values = cv2.GaussianBlur(values, (0, 0), float(rng.uniform(0.1, augmentation.blur)))
    if augmentation.noise and rng.random() < 0.3:
        sigma = rng.uniform(0, augmentation.noise) / 255
        values = values + rng.normal(0, sigma, size=values.shape).astype(np.float32)
    return np.asarray(np.clip(values, 0, 1) * 255 + 0.5, dtype=np.uint8)
