"""Rewrite a network for serving only: the same function in fewer passes over memory. A rewritten network can no longer
be trained, and weights can no longer be loaded into it.
"""

from __future__ import annotations

from copy import copy
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.poolers import RoIPooler

# In these modules the order of the children is the order in which they run: a norm listed after a convolution follows
# it.
_RUN_IN_ORDER = (nn.Sequential, BasicBlock, Bottleneck, IntermediateLayerGetter)


def fold(model: GeneralizedRCNN) -> None:
    """Fold what can be folded, in place, and switch off gradients. The network must be in evaluation mode."""
    fold_norms(model)
    flatten_channels_last(model)
    model.requires_grad_(False)


@torch.no_grad()
def fold_norms(model: nn.Module) -> None:
    """Fold batch norms, which are constant outside training, into the convolutions before them."""
    for module in model.modules():
        if isinstance(module, _RUN_IN_ORDER):
            for (name, convolution), (next_name, norm) in pairwise(list(module.named_children())):
                # Exactly these types: norms that also activate are subclasses of them.
                is_norm = type(norm) in (nn.BatchNorm2d, FrozenBatchNorm2d)
                if is_norm and isinstance(convolution, nn.Conv2d):
                    setattr(module, name, _with_norm(convolution, norm))
                    setattr(module, next_name, nn.Identity())


def _with_norm(convolution: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    weight, bias = convolution.weight, convolution.bias
    # In float64, so that each value is rounded only once.
    values = {name: value.double() for name, value in norm.state_dict().items()}
    scale = values["weight"] / (values["running_var"] + cast(float, norm.eps)).sqrt()
    shift = values["bias"] - values["running_mean"] * scale
    folded = copy(convolution)
    folded._parameters = {
        "weight": nn.Parameter((weight.double() * scale.reshape(-1, 1, 1, 1)).to(weight.dtype)),
        "bias": nn.Parameter((shift if bias is None else shift + bias.double() * scale).to(weight.dtype)),
    }
    return folded


@torch.no_grad()
def flatten_channels_last(model: GeneralizedRCNN) -> None:
    """Make the box head flatten its patches in channels-last order, which needs no copy."""
    heads = model.roi_heads
    head, pooler = heads.box_head, heads.box_roi_pool
    if not isinstance(pooler, RoIPooler) or not isinstance(pooler.output_size, int):
        return
    places = pooler.output_size**2
    if isinstance(head, TwoMLPHead):
        _reorder_inputs(head.fc6, places)
        heads.box_head = _PlaceByPlace(head)
    elif isinstance(head, FastRCNNConvFCHead):
        for index, layer in enumerate(head):
            if isinstance(layer, nn.Flatten):
                _reorder_inputs(head[index + 1], places)
                head[index] = _PlaceByPlace(layer)


def _reorder_inputs(layer: nn.Module, places: int) -> None:
    """Reorder the input weights from channel-major to position-major."""
    assert isinstance(layer, nn.Linear)
    by_channel = layer.weight.unflatten(1, (-1, places))
    layer.weight = nn.Parameter(by_channel.transpose(1, 2).flatten(start_dim=1))


class _PlaceByPlace(nn.Module):
    """Wrap a module that flattens its input, so that it sees the channels of each position side by side."""

    def __init__(self, flattens: nn.Module) -> None:
        super().__init__()
        self.flattens = flattens

    def forward(self, x: Tensor) -> Tensor:
        """(R, C, S, S) -> the module's output for (R, S, S, C)."""
        result: Tensor = self.flattens(x.permute(0, 2, 3, 1))
        return result
