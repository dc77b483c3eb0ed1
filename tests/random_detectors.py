"""Detectors with weights at random that behave as trained ones do, so that comparing their answers means something."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

from service.modeling.config import ModelConfig

# How far the outputs of each predictor lie apart.
SPREADS = {
    "rpn.head.cls_logits": 1.0,
    "rpn.head.bbox_pred": 0.05,
    "roi_heads.box_predictor.cls_score": 2.0,
    "roi_heads.box_predictor.bbox_pred": 0.3,
    "roi_heads.mask_predictor.mask_fcn_logits": 5.0,  # few probabilities at the threshold itself
}


def blobs(height: int, width: int, *, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, 3) of soft random blobs, in which random weights find more to tell apart than in noise."""
    coarse = torch.rand(1, 3, 8, 10, generator=torch.Generator().manual_seed(seed))
    smooth = functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0]
    return np.ascontiguousarray((smooth.permute(1, 2, 0).numpy() * 255).astype(np.uint8))


def with_backbone(config: ModelConfig, **changes: object) -> ModelConfig:
    """The configuration with other values in its `[backbone]`."""
    return config.model_copy(update={"backbone": config.backbone.model_copy(update=changes)})


def enliven(model: nn.Module, run: Callable[[], object]) -> None:
    """Fit norms and predictors to what passes through them.

    As weights are drawn, activations grow to thousands through the trunk, and float32's last digits with them; and all
    anchors, boxes and classes score alike, so that rounding alone decides which comes first.

    Args:
        model: a detector of torchvision's layout, in evaluation mode.
        run: lets it detect something.
    """
    hooks = []
    fitted: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            hooks.append(module.register_forward_pre_hook(_fit_norm))
        elif name in SPREADS:
            hooks.append(module.register_forward_hook(partial(_fit_predictor, spread=SPREADS[name], fitted=fitted)))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()


def _fit_norm(norm: nn.Module, inputs: tuple[Tensor]) -> None:
    (x,) = inputs
    assert isinstance(norm.running_mean, Tensor)
    assert isinstance(norm.running_var, Tensor)
    # The mean is not taken off: what hardly varies over the picture would be blown up, and rounding with it.
    norm.running_mean.zero_()
    norm.running_var.copy_((x**2).mean(dim=(0, 2, 3)) + 0.01)


def _fit_predictor(
    layer: nn.Module, inputs: object, output: Tensor, *, spread: float, fitted: set[nn.Module]
) -> Tensor:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    assert layer.bias is not None
    if layer in fitted:  # the RPN's head, on the smaller maps
        return output
    fitted.add(layer)
    by_channel = output.transpose(0, 1).flatten(1)
    mean, scale = by_channel.mean(dim=1), spread / by_channel.std()
    layer.bias.sub_(mean).mul_(scale)
    layer.weight.mul_(scale)
    return (output - mean.reshape(-1, *[1] * (output.ndim - 2))) * scale
