"""What detectron2 computes with one of its state dicts: Faster and Mask R-CNN on ResNet-FPN and ResNet-C4, one
picture at inference, written from its sources in plain PyTorch, torchvision's operators and Pillow. Shares no code with
ours.

The sources: `engine/defaults.py`, `data/transforms/augmentation_impl.py` and `transform.py`,
`modeling/postprocessing.py`, `layers/mask_ops.py`, `modeling/backbone/resnet.py` and `fpn.py`,
`modeling/anchor_generator.py`, `modeling/box_regression.py`, `modeling/proposal_generator/rpn.py` and
`proposal_utils.py`, `modeling/poolers.py`, `modeling/roi_heads/roi_heads.py`, `fast_rcnn.py` and `mask_head.py`; the
numbers are those of `config/defaults.py`, `Base-RCNN-C4.yaml` and `Base-RCNN-FPN.yaml`.

Shapes: A anchors, R proposals, K classes without the background, which detectron2 counts last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchvision.ops import batched_nms, roi_align

PIXEL_MEAN_BGR = (103.530, 116.280, 123.675)
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
SIZES = (32.0, 64.0, 128.0, 256.0, 512.0)
RATIOS = (0.5, 1.0, 2.0)
C4_TOPK = (6000, 1000)
FPN_TOPK = (1000, 1000)
SCORE_THRESH = 0.05
DETECTIONS_PER_IMAGE = 100

Weights = Mapping[str, Tensor]


def detectron2_prediction(
    weights: Weights,
    picture: NDArray[np.uint8],
    *,
    min_size: int,
    max_size: int,
    sizes: Sequence[float] = SIZES,
    **pixels: Any,
) -> dict[str, Tensor]:
    """What `DefaultPredictor` gives, in float64.

    Args:
        picture: (H, W, 3) RGB, of any size.
        min_size: INPUT.MIN_SIZE_TEST.
        max_size: INPUT.MAX_SIZE_TEST.
        sizes: ANCHOR_GENERATOR.SIZES, one for each map.
        pixels: `mean`, `std` and `stride_in_1x1` as in `detectron2_answer`, whose network reads BGR.

    Returns:
        As `detectron2_answer`, but in pixels of the picture, and with a mask head `pasted`, (D, H, W) probabilities.
    """
    height, width = picture.shape[:2]
    new_height, new_width = shortest_edge_size(height, width, min_size, max_size)
    resized = resized_by_pillow(picture, new_height, new_width)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        doubles = {key: one.double() for key, one in weights.items()}
        image = torch.from_numpy(resized[:, :, ::-1].astype(np.float64)).permute(2, 0, 1)
        found = detectron2_answer(doubles, image, sizes=sizes, **pixels)
        # `detector_postprocess`
        scale = torch.tensor([width / new_width, height / new_height]).repeat(2)
        found["boxes"] = _clipped(found["boxes"] * scale, (height, width))
        sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
        found = {key: one[(sides > 0).all(dim=1)] for key, one in found.items()}
        if "masks" in found:
            found["pasted"] = pasted(found["masks"], found["boxes"], height, width)
    finally:
        torch.set_default_dtype(default)
    return found


def shortest_edge_size(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """`ResizeShortestEdge.get_output_shape`."""
    scale = min_size * 1.0 / min(height, width)
    new_height, new_width = (min_size, scale * width) if height < width else (scale * height, min_size)
    if max(new_height, new_width) > max_size:
        scale = max_size * 1.0 / max(new_height, new_width)
        new_height, new_width = new_height * scale, new_width * scale
    return int(new_height + 0.5), int(new_width + 0.5)


def resized_by_pillow(picture: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`ResizeTransform.apply_image`. In two calls, as Pillow 13 may take the other order."""
    wide = PIL.Image.fromarray(picture).resize((width, len(picture)), PIL.Image.Resampling.BILINEAR)
    return np.array(wide.resize((width, height), PIL.Image.Resampling.BILINEAR))


def pasted(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """`paste_masks_in_image` before its threshold: (D, M, M) and (D, 4) to (D, height, width)."""
    canvases = []
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        y = (torch.arange(height) + 0.5 - y0) / (y1 - y0) * 2 - 1
        x = (torch.arange(width) + 0.5 - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)
        canvases.append(functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0])
    return torch.stack(canvases) if canvases else masks.new_zeros(0, height, width)


def detectron2_answer(
    weights: Weights,
    image: Tensor,
    *,
    mean: Sequence[float] = PIXEL_MEAN_BGR,
    std: Sequence[float] = (1.0, 1.0, 1.0),
    stride_in_1x1: bool = True,
    sizes: Sequence[float] = SIZES,
) -> dict[str, Tensor]:
    """What detectron2 finds in a picture that needs no resizing.

    Args:
        image: (3, H, W) in 0 to 255, in the order of colours that the network reads (INPUT.FORMAT).
        mean: PIXEL_MEAN in that order.
        std: PIXEL_STD likewise.
        stride_in_1x1: RESNETS.STRIDE_IN_1X1.
        sizes: ANCHOR_GENERATOR.SIZES.

    Returns:
        `boxes` (D, 4), `scores` (D,), `labels` (D,) from 0, and with a mask head `masks` (D, M, M) probabilities.
    """
    x = ((image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])[None]
    height, width = image.shape[1:]
    if "backbone.res2.0.conv1.weight" in weights:
        return _on_c4(weights, x, (height, width), stride_in_1x1, sizes)
    # `ImageList.from_tensors` pads to the pyramid's `size_divisibility`; a ResNet alone has none.
    x = functional.pad(x, (0, -width % 32, 0, -height % 32))
    return _on_a_pyramid(weights, x, (height, width), stride_in_1x1, sizes)


def _on_c4(
    weights: Weights, x: Tensor, size: tuple[int, int], stride_in_1x1: bool, sizes: Sequence[float]
) -> dict[str, Tensor]:
    """`Res5ROIHeads`: boxes and masks see res5 of the same pooled patches."""
    features = _trunk(weights, "backbone.", x, stride_in_1x1)[-1:]

    def res5(boxes: Tensor) -> Tensor:
        patches = _pool(features, [16], boxes, 14)
        return _stage(weights, "roi_heads.res5.", patches, stride=2, stride_in_1x1=stride_in_1x1)

    proposals = _proposals(weights, features, [16], [sizes], size, *C4_TOPK)
    found = _boxes(weights, proposals, res5(proposals).mean(dim=[2, 3]), size)
    return _with_masks(weights, found, res5)


def _on_a_pyramid(
    weights: Weights, x: Tensor, size: tuple[int, int], stride_in_1x1: bool, sizes: Sequence[float]
) -> dict[str, Tensor]:
    """`StandardROIHeads`: each branch has its own pooler; p6 is for proposals only."""
    maps = _pyramid(weights, _trunk(weights, "backbone.bottom_up.", x, stride_in_1x1))
    strides = [4, 8, 16, 32, 64]

    def mask_convolutions(boxes: Tensor) -> Tensor:
        patches = _pool(maps[:4], strides[:4], boxes, 14)
        for number in (1, 2, 3, 4):
            if f"roi_heads.mask_head.mask_fcn{number}.weight" in weights:
                patches = _conv(weights, f"roi_heads.mask_head.mask_fcn{number}.", patches, padding=1).relu()
        return patches

    proposals = _proposals(weights, maps, strides, [[side] for side in sizes], size, *FPN_TOPK)
    box_patches = _pool(maps[:4], strides[:4], proposals, 7)
    for number in (1, 2, 3, 4):
        if f"roi_heads.box_head.conv{number}.weight" in weights:
            box_patches = _conv(weights, f"roi_heads.box_head.conv{number}.", box_patches, padding=1).relu()
    box_features = box_patches.flatten(1)
    for layer in ("fc1", "fc2") if "roi_heads.box_head.fc2.weight" in weights else ("fc1",):
        box_features = _linear(weights, f"roi_heads.box_head.{layer}.", box_features).relu()
    return _with_masks(weights, _boxes(weights, proposals, box_features, size), mask_convolutions)


def _boxes(weights: Weights, proposals: Tensor, features: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """`FastRCNNOutputLayers.inference` on (R, …) box features."""
    predictor = "roi_heads.box_predictor."
    scores = _linear(weights, f"{predictor}cls_score.", features).softmax(dim=1)[:, :-1]
    deltas = _linear(weights, f"{predictor}bbox_pred.", features).reshape(len(proposals), -1, 4)
    deltas = deltas.expand(-1, scores.shape[1], -1)  # CLS_AGNOSTIC_BBOX_REG has one for all classes
    boxes = _clipped(_applied(deltas, proposals[:, None], BOX_WEIGHTS), size)
    chosen = scores > SCORE_THRESH
    classes = chosen.nonzero()[:, 1]
    boxes, scores = boxes[chosen], scores[chosen]
    keep = batched_nms(boxes, scores, classes, 0.5)[:DETECTIONS_PER_IMAGE]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": classes[keep]}


def _with_masks(
    weights: Weights, found: dict[str, Tensor], mask_features: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The last two layers of `MaskRCNNConvUpsampleHead` and `mask_rcnn_inference`, if there is a mask head."""
    deconv = "roi_heads.mask_head.deconv."
    if f"{deconv}weight" not in weights:
        return found
    x = mask_features(found["boxes"])
    x = functional.conv_transpose2d(x, weights[f"{deconv}weight"], weights[f"{deconv}bias"], stride=2).relu()
    logits = _conv(weights, "roi_heads.mask_head.predictor.", x)
    return {**found, "masks": logits[torch.arange(len(logits)), found["labels"]].sigmoid()}


def _trunk(weights: Weights, prefix: str, x: Tensor, stride_in_1x1: bool) -> list[Tensor]:
    """The outputs of res2 to the last stage that the trunk has: res4 on C4, res5 with a pyramid."""
    x = _conv(weights, f"{prefix}stem.conv1.", x, stride=2, padding=3).relu()
    x = functional.max_pool2d(x, kernel_size=3, stride=2, padding=1)
    outputs = []
    for stage in (2, 3, 4, 5):
        if f"{prefix}res{stage}.0.conv1.weight" in weights:
            stride = 1 if stage == 2 else 2
            x = _stage(weights, f"{prefix}res{stage}.", x, stride=stride, stride_in_1x1=stride_in_1x1)
            outputs.append(x)
    return outputs


def _stage(weights: Weights, prefix: str, x: Tensor, *, stride: int, stride_in_1x1: bool) -> Tensor:
    blocks = {int(key.removeprefix(prefix).split(".")[0]) for key in weights if key.startswith(prefix)}
    for block in sorted(blocks):
        name, stride_here = f"{prefix}{block}.", stride if block == 0 else 1
        # STRIDE_IN_1X1: the first convolution strides, not the 3 x 3.
        strides = (stride_here, 1) if stride_in_1x1 else (1, stride_here)
        if f"{name}conv3.weight" in weights:
            out = _conv(weights, f"{name}conv1.", x, stride=strides[0]).relu()
            out = _conv(weights, f"{name}conv2.", out, stride=strides[1], padding=1).relu()
            out = _conv(weights, f"{name}conv3.", out)
        else:  # `BasicBlock`
            out = _conv(weights, f"{name}conv1.", x, stride=stride_here, padding=1).relu()
            out = _conv(weights, f"{name}conv2.", out, padding=1)
        has_shortcut = f"{name}shortcut.weight" in weights
        shortcut = _conv(weights, f"{name}shortcut.", x, stride=stride_here) if has_shortcut else x
        x = (out + shortcut).relu()
    return x


def _pyramid(weights: Weights, stages: Sequence[Tensor]) -> list[Tensor]:
    """p2 to p6."""
    results: list[Tensor] = []
    above: Tensor | None = None
    for level in (5, 4, 3, 2):
        lateral = _conv(weights, f"backbone.fpn_lateral{level}.", stages[level - 2])
        above = lateral if above is None else lateral + functional.interpolate(above, scale_factor=2, mode="nearest")
        results.insert(0, _conv(weights, f"backbone.fpn_output{level}.", above, padding=1))
    return [*results, functional.max_pool2d(results[-1], kernel_size=1, stride=2)]


def _proposals(
    weights: Weights,
    maps: Sequence[Tensor],
    strides: Sequence[int],
    sizes: Sequence[Sequence[float]],
    image_size: tuple[int, int],
    pre_nms_topk: int,
    post_nms_topk: int,
) -> Tensor:
    """(R, 4): the best of each map, then what suppresses all others of its map."""
    head = "proposal_generator.rpn_head."
    boxes, scores, levels = [], [], []
    for level, (x, stride, sides) in enumerate(zip(maps, strides, sizes, strict=True)):
        hidden = _conv(weights, f"{head}conv.", x, padding=1).relu()
        logits = _conv(weights, f"{head}objectness_logits.", hidden)[0].permute(1, 2, 0).flatten()
        height, width = x.shape[-2:]
        deltas = _conv(weights, f"{head}anchor_deltas.", hidden)[0].reshape(-1, 4, height, width)
        deltas = deltas.permute(2, 3, 0, 1).reshape(-1, 4)
        best, indices = logits.topk(min(len(logits), pre_nms_topk))
        decoded = _applied(deltas, _anchors(height, width, stride, sides), (1, 1, 1, 1))
        clipped = _clipped(decoded[indices], image_size)
        nonempty = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)  # padding has anchors, too
        boxes.append(clipped[nonempty])
        scores.append(best[nonempty])
        levels.append(torch.full_like(indices, level)[nonempty])
    keep = batched_nms(torch.cat(boxes), torch.cat(scores), torch.cat(levels), 0.7)[:post_nms_topk]
    return torch.cat(boxes)[keep]


def _anchors(height: int, width: int, stride: int, sizes: Sequence[float]) -> Tensor:
    """(A, 4), row by row, in each place size by size."""
    anchors = []
    for y in range(height):
        for x in range(width):
            for size in sizes:
                for ratio in RATIOS:
                    w = math.sqrt(size**2 / ratio)
                    h = ratio * w
                    centre_x, centre_y = x * stride, y * stride
                    anchors.append([centre_x - w / 2, centre_y - h / 2, centre_x + w / 2, centre_y + h / 2])
    return torch.tensor(anchors)


def _applied(deltas: Tensor, boxes: Tensor, weights: Sequence[float]) -> Tensor:
    """`Box2BoxTransform.apply_deltas`: (…, 4) deltas and boxes."""
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + sides / 2
    deltas = deltas / torch.tensor(weights)
    centres = centres + deltas[..., :2] * sides
    sides = sides * deltas[..., 2:].clamp(max=math.log(1000 / 16)).exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], dim=-1)


def _clipped(boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    height, width = image_size
    return torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height], dtype=boxes.dtype))


def _pool(maps: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, side: int) -> Tensor:
    """`ROIPooler` with ROIAlignV2: aligned, as many samples as the box needs; each box from its own level."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    levels = torch.floor(4 + torch.log2(areas.sqrt() / 224)).clamp(math.log2(strides[0]), math.log2(strides[-1]))
    pooled = maps[0].new_zeros(len(boxes), maps[0].shape[1], side, side)
    for x, stride in zip(maps, strides, strict=True):
        mine = levels == math.log2(stride)
        pooled[mine] = roi_align(x, [boxes[mine]], side, 1 / stride, sampling_ratio=0, aligned=True)
    return pooled


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, weights[f"{name}weight"], weights[f"{name}bias"])


def _conv(weights: Weights, name: str, x: Tensor, *, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution with its bias, its frozen batch norm or its group norm."""
    weight = weights[f"{name}weight"]
    groups = x.shape[1] // weight.shape[1]
    x = functional.conv2d(x, weight, weights.get(f"{name}bias"), stride, padding, groups=groups)
    if f"{name}norm.weight" not in weights:
        return x
    if f"{name}norm.running_mean" not in weights:
        return functional.group_norm(x, 32, weights[f"{name}norm.weight"], weights[f"{name}norm.bias"], eps=1e-5)
    mean, var, scale, shift = (
        weights[f"{name}norm.{key}"] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return functional.batch_norm(x, mean, var, scale, shift, eps=1e-5)
