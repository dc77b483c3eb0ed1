"""The numbers of the networks' papers, where they differ from torchvision's FPN models."""

from __future__ import annotations

from typing import Any


def paper_defaults(architecture: object, backbone: str, *, has_convs: bool) -> dict[str, dict[str, Any]]:
    """Values, by table, for which a network's own papers differ from the defaults of torchvision's FPN models.

    Girshick 2015 (Fast R-CNN: VGG-16, 2 images of 64 RoIs), Ren et al. 2015 (Faster R-CNN: anchors, 300 proposals at
    test, 128 RoIs), He et al. 2017 (Mask R-CNN on C4: 5 scales, 64 RoIs); 12000 -> 2000 and 6000 are from Faster
    R-CNN's code. Girshick et al. 2014 (R-CNN).

    Args:
        has_convs: whether the box head begins with convolutions, unlike the papers' heads.
    """
    tables: dict[str, dict[str, Any]] = {"transform": {}, "anchors": {}, "rpn": {}, "roi": {}}
    if backbone == "mobilenet_v3_large_fpn":
        tables["anchors"] = {"sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),) * 3}
        tables["rpn"] = {"score_thresh": 0.05}
    elif backbone == "vgg16":
        tables["transform"] = {"min_size": 600, "max_size": 1000}
        tables["anchors"] = {"sizes": ((128.0, 256.0, 512.0),)}
        tables["roi"] = {"batch_size_per_image": 128}
        if not has_convs:
            tables["roi"] |= {"box_head_channels": 4096, "box_head_dropout": 0.5}
    elif backbone.endswith(("_c4", "_c5")) or backbone.startswith("torchvision/"):
        tables["anchors"] = {"sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),)}
        if backbone.endswith("_c4"):
            tables["roi"] = {"batch_size_per_image": 64, "box_output_size": 14, "mask_head_channels": (256,)}
    if backbone == "vgg16" or backbone.endswith("_c4"):
        tables["rpn"] = {"pre_nms_top_n_train": 12_000, "pre_nms_top_n_test": 6000, "post_nms_top_n_test": 300}
    if architecture in ("fast_rcnn", "rcnn"):
        tables["anchors"], tables["rpn"] = {}, {}
        tables["roi"] |= {"batch_size_per_image": 64}
    if architecture == "rcnn":
        tables["roi"] |= {"op": "crop"}
    return {name: numbers for name, numbers in tables.items() if numbers}
