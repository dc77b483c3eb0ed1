"""Spatial pyramid pooling, the operator of SPPnet: grids of maxima, coarse to fine, over one box.

Shapes: see `rois.py`; B bins of all grids together, the sum of g * g over the grids' sides g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchvision
from torch import Tensor

from service.ops.rois import Boxes, as_pair, as_rois, at_least_float32


def spp(input: Tensor, boxes: Boxes, output_size: int | Sequence[int], spatial_scale: float = 1.0) -> Tensor:
    """Pool every box with RoI Pool once for each grid and concatenate the bins (He et al., SPPnet, sections 2.2 and 4).

    The Fast R-CNN paper defines RoI Pool as a pyramid of one level, so each level here is exactly RoI Pool, including
    the rounding of corners. (SPPnet itself projects corners slightly differently, to the cells whose centres the box
    encloses.)

    Args:
        input: (N, C, H, W) features.
        boxes: (K, 5) as (image index, x1, y1, x2, y2), or (L, 4) for each image.
        output_size: the side g of each grid, such as (4, 2, 1); a grid is always square.
        spatial_scale: cells per unit of the boxes, `1 / stride` for boxes in image pixels.

    Returns:
        (K, C, B, 1) in the input's dtype: the grids in the given order, each row by row. A head that flattens its input
        gets C * B values, 21 * C for (4, 2, 1).

    Raises:
        ValueError: see `as_rois`, or sides that are not whole numbers of 1 or more.
    """
    rois = as_rois(boxes, input, spatial_scale)
    grids = [as_pair(side) for side in ([output_size] if isinstance(output_size, int) else output_size)]
    if not grids:
        raise ValueError("expected the side of one grid at least, got none")
    features = at_least_float32(input)
    levels = [torchvision.ops.roi_pool(features, rois, grid).flatten(start_dim=2) for grid in grids]
    return torch.cat(levels, dim=2).unsqueeze(3).to(input.dtype)
