"""R-CNN's own parts, for use in a `FastRCNN`: each proposal is cut from the image and runs through the whole network
separately, so nothing is shared between proposals. Knows images and boxes; knows nothing of classes or losses.

Shapes: R proposals of the whole batch, C channels of the pictures (3 for RGB), S x S the crop, F values after the box
head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from service.modeling.config import RoIConfig
from service.ops import crop
from service.ops.rois import rois_of


class WholeImage(nn.Module):
    """Takes the place of the backbone: the image itself is the only map, of stride 1."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(N, C, H, W) -> the same, as `0`."""
        return {"0": x}


class CropBranch(nn.Module):
    """Cut every box from the image with context, warp it to one size, and run it through the network.

    Args:
        roi: size of the crops, their context, and how many run at once.
        backbone: (R, C, S, S) -> one map.
        pool: that map -> (R, C', h, w), the box head's input.
        box_head: (R, C', h, w) -> (R, F).
    """

    def __init__(self, *, roi: RoIConfig, backbone: nn.Module, pool: nn.Module, box_head: nn.Module) -> None:
        super().__init__()
        self.roi = roi
        self.backbone = backbone
        self.pool = pool
        self.box_head = box_head

    def forward(
        self, features: Mapping[str, Tensor], boxes: Sequence[Tensor], image_sizes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Process all boxes of a batch; when serving, `crops_per_chunk` at a time, to bound memory.

        Args:
            features: the images (N, C, H, W) as `0`, normalised, so that 0 is the mean colour.
            boxes: (L, 4) for each image, in pixels of the resized image.
            image_sizes: not used; torchvision's heads pass it.

        Returns:
            (R, F), the boxes of all images in order.
        """
        (images,) = features.values()
        rois = rois_of(boxes)
        # In training, batch norms compute their statistics over all sampled boxes at once.
        chunk = max(1, len(rois)) if self.training else self.roi.crops_per_chunk
        # With no boxes there is one empty chunk, which gives (0, F).
        return torch.cat([self._look(images, some) for some in rois.split(chunk)])

    def _look(self, images: Tensor, rois: Tensor) -> Tensor:
        crops = crop(images, rois, self.roi.crop_size, padding=self.roi.crop_padding)
        (feature,) = self.backbone(crops).values()
        values: Tensor = self.box_head(self.pool(feature))
        return values
