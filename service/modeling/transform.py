"""From pixels to the network's input: torchvision's transform, and the sizes that it leads to without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform

SIZE_DIVISIBLE = 32
"""Batches are padded to multiples of this, the coarsest stride of the backbones."""


class Transform(GeneralizedRCNNTransform):
    """Normalise, resize and pad. `image_size` is (height, width) in pixels throughout."""

    def resized_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size that `resize` gives to an image, in evaluation mode. At least 1 pixel a side."""
        scale = self._scale(image_size)
        height, width = (max(1, math.floor(side * scale)) for side in image_size)
        return height, width

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """The size of the batch that an image gets when it is alone: images of one padded size may share a batch."""
        height, width = (math.ceil(side / SIZE_DIVISIBLE) * SIZE_DIVISIBLE for side in self.resized_size(image_size))
        return height, width

    def prepare(self, images: Sequence[Tensor]) -> ImageList:
        """Make one batch.

        Args:
            images: (H, W, 3) uint8 RGB each, on the network's device.

        Returns:
            (N, 3, H', W') float32 with H', W' multiples of 32, and each image's own size in it.
        """
        batch, _ = self([image.permute(2, 0, 1).float().div_(255) for image in images])
        return batch

    def _scale(self, image_size: tuple[int, int]) -> float:
        return min(self.min_size[-1] / min(image_size), self.max_size / max(image_size))
