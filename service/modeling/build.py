"""`build_model`: the whole network as one nested expression, from torchvision's parts. The parts have torchvision's
names, so its published state dicts load with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from service.errors import ModelStoreError
from service.modeling.anchors import UnroundedAnchorGenerator
from service.modeling.backbone import Backbone, build_backbone, norm_layer
from service.modeling.config import NUM_CHANNELS, AnchorsConfig, ModelConfig, RoIConfig
from service.modeling.fast_rcnn import FastRCNN, NoRPN
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.heads import DropoutMLPHead, Res5BoxHead, Res5MaskHead
from service.modeling.poolers import RoIPooler
from service.modeling.rcnn import CropBranch, WholeImage
from service.modeling.roi_heads import RoIHeads
from service.modeling.rpn import RegionProposalNetwork
from service.modeling.transform import Transform


def build_model(config: ModelConfig) -> GeneralizedRCNN:
    """Build the network that `config` describes, with random weights, in training mode.

    Raises:
        ModelStoreError: see `build_backbone`, or the anchors do not match the number of feature maps.
    """
    backbone = build_backbone(config.backbone, in_channels=NUM_CHANNELS[config.transform.channels])
    if not config.has_rpn:
        return FastRCNN(
            backbone=WholeImage() if config.architecture == "rcnn" else backbone.module,
            rpn=NoRPN(),
            roi_heads=_build_roi_heads(config, backbone),
            transform=Transform(config.transform),
            proposals=config.proposals,
        )
    return GeneralizedRCNN(
        backbone=backbone.module,
        rpn=_build_rpn(config, backbone),
        roi_heads=_build_roi_heads(config, backbone),
        transform=Transform(config.transform),
    )


def _build_rpn(config: ModelConfig, backbone: Backbone) -> RegionProposalNetwork:
    if len(config.anchors.sizes) != len(backbone.strides):
        raise ModelStoreError(
            f"expected anchors.sizes for the {len(backbone.strides)} feature maps of {config.backbone.name}, of "
            f"strides {', '.join(map(str, backbone.strides))}, got {len(config.anchors.sizes)}"
        )
    rpn, anchor_generator = config.rpn, _build_anchor_generator(config.anchors, backbone.strides)
    return RegionProposalNetwork(
        anchor_generator=anchor_generator,
        head=RPNHead(
            backbone.out_channels,
            anchor_generator.num_anchors_per_location()[0],
            conv_depth=rpn.head_conv_depth,
        ),
        fg_iou_thresh=rpn.fg_iou_thresh,
        bg_iou_thresh=rpn.bg_iou_thresh,
        batch_size_per_image=rpn.batch_size_per_image,
        positive_fraction=rpn.positive_fraction,
        pre_nms_top_n={"training": rpn.pre_nms_top_n_train, "testing": rpn.pre_nms_top_n_test},
        post_nms_top_n={"training": rpn.post_nms_top_n_train, "testing": rpn.post_nms_top_n_test},
        nms_thresh=rpn.nms_thresh,
        score_thresh=rpn.score_thresh,
    )


def _build_anchor_generator(anchors: AnchorsConfig, strides: Sequence[int]) -> AnchorGenerator:
    if anchors.style == "torchvision":
        return AnchorGenerator(anchors.sizes, anchors.ratios_by_level)
    by_ratio = anchors.style == "mmdetection"
    return UnroundedAnchorGenerator(anchors.sizes, anchors.ratios_by_level, strides=strides, by_ratio=by_ratio)


def _build_roi_heads(config: ModelConfig, backbone: Backbone) -> RoIHeads:
    roi = config.roi
    heads = RoIHeads(  # type: ignore[no-untyped-call]  # torchvision has no annotation
        box_roi_pool=_build_box_roi_pool(roi, backbone),
        box_head=nn.Identity() if roi.op == "crop" else _build_box_head(roi, backbone),
        box_predictor=FastRCNNPredictor(
            2 * backbone.out_channels if backbone.res5 is not None else roi.box_head_channels, config.num_classes
        ),
        fg_iou_thresh=roi.fg_iou_thresh,
        bg_iou_thresh=roi.bg_iou_thresh,
        batch_size_per_image=roi.batch_size_per_image,
        positive_fraction=roi.positive_fraction,
        bbox_reg_weights=roi.box_weights,
        score_thresh=config.detections.score_thresh,
        nms_thresh=config.detections.nms_thresh,
        detections_per_img=config.detections.detections_per_img,
    )
    heads.class_agnostic_nms = config.detections.class_agnostic_nms
    if config.has_masks:
        mask_channels = roi.mask_head_channels[-1]
        heads.mask_roi_pool = RoIPooler(
            roi=roi.mask_branch(), output_size=roi.mask_output_size, strides=backbone.pooled_strides
        )
        heads.mask_head = _build_mask_head(roi, backbone)
        heads.mask_predictor = MaskRCNNPredictor(
            2 * backbone.out_channels if backbone.res5 is not None else mask_channels, mask_channels, config.num_classes
        )
    return heads


def _build_box_roi_pool(roi: RoIConfig, backbone: Backbone) -> nn.Module:
    if roi.op == "crop":
        return CropBranch(
            roi=roi,
            backbone=backbone.module,
            # res5 takes conv4's map unchanged and averages its own output.
            pool=nn.Identity() if backbone.res5 is not None else nn.AdaptiveMaxPool2d(roi.box_output_size),
            box_head=_build_box_head(roi, backbone),
        )
    return RoIPooler(
        roi=roi,
        output_size=roi.spp_levels if roi.op == "spp" else roi.box_output_size,
        strides=backbone.pooled_strides,
    )


def _build_mask_head(roi: RoIConfig, backbone: Backbone) -> nn.Module:
    if backbone.res5 is not None:
        return Res5MaskHead(backbone.res5)
    return MaskRCNNHeads(
        backbone.out_channels,
        roi.mask_head_channels,
        dilation=1,
        norm_layer=roi.head_norm and norm_layer(roi.head_norm),
    )


def _build_box_head(roi: RoIConfig, backbone: Backbone) -> nn.Module:
    if backbone.res5 is not None:
        return Res5BoxHead(backbone.res5)
    if not roi.box_head_convs:
        in_channels = backbone.out_channels * roi.box_bins
        if roi.box_head_dropout:
            return DropoutMLPHead(in_channels, roi.box_head_channels, dropout=roi.box_head_dropout)
        return TwoMLPHead(in_channels, roi.box_head_channels)
    return FastRCNNConvFCHead(
        (backbone.out_channels, roi.box_output_size, roi.box_output_size),
        list(roi.box_head_convs),
        [roi.box_head_channels],
        norm_layer=roi.head_norm and norm_layer(roi.head_norm),
    )
