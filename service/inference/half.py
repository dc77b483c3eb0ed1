"""A network in half precision: its weights are cast once, its parts exchange half-precision tensors, and values that
overflow the format are detected. Boxes are still decoded in float32.

Shapes: see `service/modeling/parts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from service.errors import ModelStoreError
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.parts import Parts, TrunkOutput

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class PrecisionError(ModelStoreError):
    """A network cannot run in a number format: its weights are too large for it, or it was not made for it."""


class HalfNetwork:
    """Casts a network's weights in place. `wrapped` adapts its `parts`, whichever engine runs them.

    Args:
        model: in evaluation mode, folded.
        precision: one of `DTYPES`.

    Raises:
        PrecisionError: a weight is too large for the format.
    """

    def __init__(self, model: GeneralizedRCNN, precision: str) -> None:
        self._model = model
        self._dtype = DTYPES[precision]
        self._checks: list[Tensor] = []
        self._twin: GeneralizedRCNN | None = None
        # Not the transform: it scales pixels in float32.
        for module in (model.backbone, model.rpn, model.roi_heads):
            _cast(module, self._dtype)
        too_large = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
        if too_large:
            raise PrecisionError(f"the weights of {too_large[0]} do not fit {precision}")

    def wrapped(self, parts: Parts) -> Parts:
        """The parts, with inputs cast to half precision and outputs checked for infinities and NaN on the device."""
        mask_head = parts.mask_head

        def run_trunk(batch: Tensor) -> TrunkOutput:
            self._checks = []  # Those of a batch that failed count for no other.
            output = parts.trunk(batch.to(self._dtype))
            self._check(output.objectness, output.deltas)
            return output

        def run_backbone(batch: Tensor) -> Mapping[str, Tensor]:
            self._checks = []
            return parts.backbone(batch.to(self._dtype))

        def run_box_head(pooled: Tensor) -> tuple[Tensor, Tensor]:
            class_logits, box_regression = parts.box_head(pooled.to(self._dtype))
            self._check(class_logits, box_regression)
            return class_logits, box_regression

        def run_mask_head(pooled: Tensor, labels: Tensor) -> Tensor:
            assert mask_head is not None
            logits = mask_head(pooled.to(self._dtype), labels)
            self._check(logits)
            return logits

        return Parts(
            trunk=run_trunk,
            backbone=run_backbone,
            box_head=run_box_head,
            mask_head=None if mask_head is None else run_mask_head,
        )

    def take_check(self) -> Tensor:
        """() float32 on the device: 1 if all outputs since the last call were finite, else 0. Does not synchronize.

        A value that overflows inside the network becomes infinite or NaN, and this propagates through the following
        layers to an output.
        """
        checks, self._checks = self._checks, []
        return torch.stack(checks).all().float()

    def in_float32(self) -> GeneralizedRCNN:
        """The same network in float32, with the rounded weights. Created on first use and kept."""
        if self._twin is None:
            parts, self._model.parts = self._model.parts, None
            try:
                self._twin = deepcopy(self._model).float()
            finally:
                self._model.parts = parts
        return self._twin

    def _check(self, *outputs: Tensor) -> None:
        self._checks += [one.isfinite().all() for one in outputs]


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights. Norms that were not folded into a convolution stay in float32: variances need its range."""
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            continue
        for parameter in child.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(child, name, buffer.to(dtype))
