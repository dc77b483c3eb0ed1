"""Region proposal network: torchvision's for training; for serving, all images and levels of a batch at once, with the
same results.

Shapes: N images, A anchors of all levels of an image, T anchors that are the best of their level.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import rpn

from service.devices import device_of
from service.modeling.box_regression import decode_boxes
from service.modeling.per_image import to_device
from service.ops._cpu_boxes import choose_proposals
from service.ops.nms import Kept, best_of_each_image, rounded_down

Size = tuple[int, int]
_MOST_ANCHOR_BYTES = 1 << 28
"""Anchors of the batch sizes used last are cached up to this; a batch of 1088 x 800 pixels has 3.5 MB of them, so that
the sizes of all aspect ratios fit.
"""


class RegionProposalNetwork(rpn.RegionProposalNetwork):
    """torchvision's RPN with a faster inference path. Takes the same arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._anchors: OrderedDict[object, Tensor] = OrderedDict()

    def propose(
        self,
        objectness: Tensor,
        deltas: Tensor,
        *,
        padded_size: Size,
        grid_sizes: Sequence[Size],
        image_sizes: Sequence[Size],
    ) -> list[Tensor]:
        """Choose each image's proposals: the steps of torchvision's `forward` and `filter_proposals`.

        Args:
            objectness: (N, A) logits.
            deltas: (N, A, 4).
            padded_size: (height, width) of the batch in pixels.
            grid_sizes: (height, width) of each feature map.
            image_sizes: (height, width) of each image within the batch; boxes are clipped to it.

        Returns:
            (L, 4) float32 for each image, in pixels of the resized image, best first. On CUDA, where reading the number
            of proposals would synchronize, the number is fixed and missing proposals are empty boxes, which yield no
            detections.
        """
        device = device_of(objectness.device)
        anchors = self.lay_anchors(padded_size, grid_sizes, objectness.device)
        if device.kernels == "numba":
            return choose_proposals(
                objectness.float(),
                deltas.float(),
                anchors,
                counts=self._counts(grid_sizes),
                image_sizes=image_sizes,
                pre_nms_top_n=self.pre_nms_top_n(),
                post_nms_top_n=self.post_nms_top_n(),
                weights=self.box_coder.weights,
                largest_stretch=self.box_coder.bbox_xform_clip,
                min_size=self.min_size,
                score_thresh=self.score_thresh,
                iou_thresh=rounded_down([self.nms_thresh])[0],
            )
        limits = to_device(image_sizes, torch.float32, objectness.device)
        boxes, kept = self._choose(objectness, deltas, anchors, grid_sizes, limits)
        return list(self._table(boxes, kept).unbind())

    def propose_table(
        self,
        objectness: Tensor,
        deltas: Tensor,
        *,
        anchors: Tensor,
        grid_sizes: Sequence[Size],
        image_sizes: Tensor,
    ) -> Tensor:
        """Like `propose`, with results of a size that does not depend on what is found, and without any copy between
        host and device.

        Args:
            objectness: see `propose`.
            deltas: see `propose`.
            anchors: see `lay_anchors`.
            grid_sizes: see `propose`.
            image_sizes: (N, 2) float32 (height, width) on the device.

        Returns:
            (N, P, 4) float32: each image's proposals, best first, then empty boxes.
        """
        return self._table(*self._choose(objectness, deltas, anchors, grid_sizes, image_sizes))

    def _table(self, boxes: Tensor, kept: Kept) -> Tensor:
        num_images = len(kept.starts) - 1
        rows, exist = kept.table(min(self.post_nms_top_n(), len(boxes) // num_images))
        return boxes[rows] * exist.unsqueeze(2)

    def _choose(
        self,
        objectness: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        grid_sizes: Sequence[Size],
        image_sizes: Tensor,
    ) -> tuple[Tensor, Kept]:
        """All images' candidates, (N * T, 4), and which of them are proposals."""
        # 1. The best of each level, by logit.
        places, levels = self._best_of_each_level(objectness, grid_sizes)
        logits = objectness.gather(1, places).float()
        best_deltas = deltas.gather(1, places.unsqueeze(2).expand(-1, -1, 4)).float()
        # 2. Decode their boxes, and clip them to each image.
        boxes = decode_boxes(self.box_coder, best_deltas.flatten(end_dim=1), anchors[places].flatten(end_dim=1))
        boxes = boxes.reshape(*places.shape, 4)
        heights, widths = image_sizes.unsqueeze(1).unbind(dim=2)
        limits = torch.stack([widths, heights, widths, heights], dim=2)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        # 3. Drop empty and unlikely boxes, then boxes that overlap a better one of their level.
        scores = logits.sigmoid()
        sides = boxes[..., 2:] - boxes[..., :2]
        valid = (sides >= self.min_size).all(dim=2) & (scores >= self.score_thresh)
        images = torch.arange(len(image_sizes), device=boxes.device).unsqueeze(1).expand_as(places)
        boxes = boxes.flatten(end_dim=1)
        kept = best_of_each_image(
            boxes,
            scores.flatten(),
            images=images.flatten(),
            classes=levels.expand_as(places).flatten(),
            valid=valid.flatten(),
            num_images=len(image_sizes),
            num_classes=len(grid_sizes),
            iou_thresh=self.nms_thresh,
            largest_group=self.pre_nms_top_n(),
        )
        return boxes, kept

    def _best_of_each_level(self, objectness: Tensor, grid_sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
        """(N, T) indices of anchors, and (T,) the level of each."""
        counts = self._counts(grid_sizes)
        starts = [sum(counts[:level]) for level in range(len(counts))]
        best = [
            one.topk(min(self.pre_nms_top_n(), count), dim=1).indices + start
            for one, count, start in zip(objectness.split(counts, dim=1), counts, starts, strict=True)
        ]
        levels = [one.new_full((one.shape[1],), level) for level, one in enumerate(best)]
        return torch.cat(best, dim=1), torch.cat(levels)

    def _counts(self, grid_sizes: Sequence[Size]) -> list[int]:
        """How many anchors each level has."""
        per_place = self.anchor_generator.num_anchors_per_location()
        return [height * width * each for (height, width), each in zip(grid_sizes, per_place, strict=True)]

    def lay_anchors(self, padded_size: Size, grid_sizes: Sequence[Size], device: torch.device) -> Tensor:
        """The anchors for a batch of this size. Those used last are cached.

        Args:
            padded_size: (height, width) of the batch in pixels.
            grid_sizes: (height, width) of each feature map.
            device: where they are needed.

        Returns:
            (A, 4) float32 as (x1, y1, x2, y2), in pixels of the batch.
        """
        key = (padded_size, *grid_sizes, device)
        if key not in self._anchors:
            # On the host: an operation takes them from there without waiting for the device.
            strides = [
                [torch.tensor(side // cells) for side, cells in zip(padded_size, grid, strict=True)]
                for grid in grid_sizes
            ]
            self.anchor_generator.set_cell_anchors(torch.float32, device)
            self._anchors[key] = torch.cat(
                self.anchor_generator.grid_anchors([list(one) for one in grid_sizes], strides)
            )
            while len(self._anchors) > 1 and sum(one.nbytes for one in self._anchors.values()) > _MOST_ANCHOR_BYTES:
                self._anchors.popitem(last=False)
        self._anchors.move_to_end(key)
        return self._anchors[key]
