"""RoI operators: cut a patch of fixed size from a feature map for every box. All take `(input, boxes, output_size,
spatial_scale, ...)` and have no weights; `docs/roi-operators.md` compares them.
"""

from service.ops.crop import crop
from service.ops.multi_scale import assign_levels, multi_scale
from service.ops.roi_align import roi_align
from service.ops.roi_align_max import roi_align_max
from service.ops.roi_pool import roi_pool
from service.ops.roi_warp import roi_warp
from service.ops.spp import spp

__all__ = ["assign_levels", "crop", "multi_scale", "roi_align", "roi_align_max", "roi_pool", "roi_warp", "spp"]
