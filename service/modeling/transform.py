"""From pixels to the network's input: torchvision's transform or detectron2's, and the resulting sizes without running
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes

from service.devices import device_of
from service.modeling.buckets import Size, round_up, smallest_bucket
from service.modeling.config import NUM_CHANNELS, TransformConfig
from service.ops.pillow_resize import pillow_resize_normalise_and_pad, resize_bytes
from service.ops.resize import gpu_resizes_alike, resize_normalise_and_pad

_LUMINANCE = (19_595, 38_470, 7_471)
"""0.299, 0.587 and 0.114 (ITU-R BT.601) as multiples of 2^-16, like Pillow's `convert("L")`: grey stays unchanged."""


class Transform(GeneralizedRCNNTransform):
    """Normalise, resize and pad, or in detectron2's style resize, normalise and pad. `image_size` is (height, width) in
    pixels throughout.

    Args:
        config: the style, sizes in pixels, the channels that the network reads, and the mean and standard deviation of
            each channel (pixels scaled to 0..1).

    Attributes:
        num_channels: C, the channels that the network reads: 3 for RGB, 1 for grey, 4 for RGBA.
        buckets: sizes to pad to in evaluation mode, each image to the smallest that holds it; an image that none of
            them holds is padded to multiples of `size_divisible`, as all are if there are none.
        is_detectron2s: whether the style is detectron2's.
    """

    buckets: Sequence[Size] = ()

    _mean: Tensor
    _std: Tensor
    _grey_weights: Tensor

    def __init__(self, config: TransformConfig) -> None:
        super().__init__(
            min_size=config.min_size,
            max_size=config.max_size,
            image_mean=list(config.mean),
            image_std=list(config.std),
            size_divisible=config.size_divisible,
        )
        self._config = config
        # Kept on the network's device: torchvision would copy them for every image, and wait each time. They are not
        # weights.
        self.register_buffer("_mean", torch.tensor(config.mean).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(config.std).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("_grey_weights", torch.tensor(_LUMINANCE, dtype=torch.int32), persistent=False)
        self.num_channels = NUM_CHANNELS[config.channels]
        self.is_detectron2s = config.style == "detectron2"

    def resized_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size of an image after `resize` in evaluation mode, at least 1 pixel per side."""
        if self.is_detectron2s:
            return self._nearest_size(image_size)
        scale = self.scale(image_size)
        height, width = (max(1, math.floor(side * scale)) for side in image_size)
        return height, width

    def _nearest_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """detectron2's `ResizeShortestEdge`, step by step, as the last bit of a product may decide a size."""
        shorter, limit = float(self._config.min_size), float(self._config.max_size)
        sides = [shorter / min(image_size) * side for side in image_size]
        sides[0 if image_size[0] < image_size[1] else 1] = shorter
        if max(sides) > limit:
            scale = limit / max(sides)
            sides = [side * scale for side in sides]
        height, width = (max(1, int(side + 0.5)) for side in sides)
        return height, width

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size of a batch that holds only this image. Images with the same padded size may share a batch."""
        own = round_up(self.resized_size(image_size), self._config.size_divisible)
        return smallest_bucket(own, self.buckets) or own

    @property
    def most_pixels(self) -> int:
        """No padded image has more pixels than this."""
        multiple, longest = self._config.size_divisible, self._config.max_size
        shorter, longer = (
            math.ceil(side / multiple) * multiple for side in (min(self._config.min_size, longest), longest)
        )
        return shorter * longer

    def normalize(self, image: Tensor) -> Tensor:
        """The step before `resize`: (3, H, W) RGB or (C, H, W) in 0..1 -> (C, H, W) around 0, like torchvision's. In
        detectron2's style still in 0..1, since `resize` wants bytes.
        """
        image = self._with_channels(image)
        return image if self.is_detectron2s else (image - self._mean) / self._std

    def _with_channels(self, image: Tensor) -> Tensor:
        if len(image) == self.num_channels:
            return image
        return self._grey(image) if self.num_channels == 1 else torch.cat([image, torch.ones_like(image[:1])])

    def _grey(self, image: Tensor) -> Tensor:
        """(3, H, W) RGB in 0..1 -> (1, H, W): the luminance, rounded to one of 256 values as Pillow does."""
        bytes_ = (image * 255).round().to(torch.int32)
        luminance = (bytes_ * self._grey_weights.reshape(3, 1, 1)).sum(dim=0, keepdim=True, dtype=torch.int32)
        return ((luminance + (1 << 15)) >> 16).to(image.dtype) / 255

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """torchvision's, except that in evaluation mode a very long image keeps a side of 1 pixel instead of none; or
        detectron2's, which normalises too.

        Args:
            image: (C, H, W), from `normalize`.
            target: the image's `boxes` (K, 4) and perhaps `masks` (K, H, W), in its pixels.

        Returns:
            (C, h, w), see `resized_size`, and the target in its pixels.
        """
        height, width = image.shape[-2:]
        size = self.resized_size((height, width))
        if self.is_detectron2s:
            bytes_ = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
            resized_bytes = resize_bytes(bytes_, size).permute(2, 0, 1)
            image = (resized_bytes / 255 - self._mean) / self._std
            return image, None if target is None else _resized_target(target, (height, width), size)
        if self.training or target is not None:
            resized: tuple[Tensor, dict[str, Tensor] | None] = super().resize(image, target)
            return resized
        return functional.interpolate(image[None], size, mode="bilinear", align_corners=False)[0], None

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        """torchvision's, except that in evaluation mode every image is padded to its bucket.

        Args:
            images: (C, h, w) each, from `resize`.
            size_divisible: the batch's sides are multiples of this.

        Returns:
            (N, C, H', W'), each image at the top left, zeros around it.
        """
        if self.training or not self.buckets:
            padded: Tensor = super().batch_images(images, size_divisible=size_divisible)
            return padded
        own = [round_up((image.shape[-2], image.shape[-1]), size_divisible) for image in images]
        sizes = [smallest_bucket(one, self.buckets) or one for one in own]
        batch = images[0].new_zeros(len(images), images[0].shape[0], *_largest(sizes))
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return batch

    def prepare(self, images: Sequence[Tensor]) -> ImageList:
        """Make one batch.

        Args:
            images: (H, W, 3) uint8 RGB each, on the network's device.

        Returns:
            (N, C, H', W') float32 with H', W' multiples of `size_divisible`, and each image's own size in it.
        """
        if (kernel := self._kernel(images[0].device)) is not None:
            sizes = [self.resized_size((image.shape[0], image.shape[1])) for image in images]
            common = _largest([self.padded_size((image.shape[0], image.shape[1])) for image in images])
            return ImageList(kernel(images, sizes, common, mean=self._config.mean, std=self._config.std), sizes)
        batch: ImageList
        batch, _ = self([image.permute(2, 0, 1).float().div_(255) for image in images])
        return batch

    def _kernel(self, device: torch.device) -> Callable[..., Tensor] | None:
        """What does all steps in one pass; for three channels only."""
        kernels = None if self.num_channels != 3 else device_of(device).kernels
        if kernels == "numba":
            return pillow_resize_normalise_and_pad if self.is_detectron2s else resize_normalise_and_pad
        if kernels == "triton" and not self.is_detectron2s and gpu_resizes_alike(device):
            # Imported here: Triton comes with PyTorch for CUDA on Linux only.
            from service.ops import _cuda_resize

            return _cuda_resize.resize_normalise_and_pad
        return None

    def scale(self, image_size: tuple[int, int]) -> float:
        """Pixels of the resized image per pixel of the original."""
        return min(self._config.min_size / min(image_size), self._config.max_size / max(image_size))


def _largest(sizes: Sequence[Size]) -> Size:
    """The size that holds all of them."""
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _resized_target(
    target: dict[str, Tensor], original: tuple[int, int], resized: tuple[int, int]
) -> dict[str, Tensor]:
    """An image's boxes and masks in pixels of the resized image."""
    target = {**target, "boxes": resize_boxes(target["boxes"], list(original), list(resized))}
    if "masks" in target:
        target["masks"] = functional.interpolate(target["masks"][:, None].float(), resized)[:, 0].byte()
    return target
