"""The `compiled` engine: a network's convolutional parts by `torch.compile`. Called by `choosing.py`. Half precision
comes from the autocast around the whole network; boxes are decoded in float32 as with every engine.

A part is compiled for all sizes of pictures and all numbers of patches at once, and once more for a single picture:
torch makes a constant of a length of 1. That is done while the predictor warms up; what comes later and does not fit
(a feature map one cell wide) runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.parts import Parts, TrunkOutput, run_trunk

_PATCHES = 128
"""Numbers of patches are rounded up to multiples of this, so that one patch needs no code of its own."""


def compiled_parts(model: GeneralizedRCNN, *, backend: str | Callable[..., Any] = "inductor") -> Parts:
    """Wrap the parts of a network; each compiles itself when it meets a shape that its code does not fit.

    Args:
        model: in evaluation mode, on its device.
        backend: of `torch.compile`.
    """
    own = model.own_parts()
    compile_part = partial(torch.compile, backend=backend)
    trunk = compile_part(partial(run_trunk, model.backbone, model.rpn.head))
    backbone, box_head = compile_part(model.backbone), compile_part(own.box_head)
    mask_head = None if own.mask_head is None else compile_part(own.mask_head)

    def run_the_trunk(batch: Tensor) -> TrunkOutput:
        output: TrunkOutput = trunk(_of_any_size(batch, 0, 2, 3))
        return output

    def run_backbone(batch: Tensor) -> Mapping[str, Tensor]:
        maps: Mapping[str, Tensor] = backbone(_of_any_size(batch, 0, 2, 3))
        return maps

    def run_box_head(pooled: Tensor) -> tuple[Tensor, Tensor]:
        class_logits, box_regression = box_head(_filled_up(pooled))
        return class_logits[: len(pooled)], box_regression[: len(pooled)]

    def run_mask_head(pooled: Tensor, labels: Tensor) -> Tensor:
        assert mask_head is not None
        logits: Tensor = mask_head(_filled_up(pooled), _filled_up(labels))
        return logits[: len(pooled)]

    return Parts(
        trunk=run_the_trunk,
        backbone=run_backbone,
        box_head=run_box_head,
        mask_head=None if mask_head is None else run_mask_head,
    )


def check_compiler(device: torch.device) -> None:
    """Compile a sum.

    Raises:
        Exception: of whatever is missing: Triton, a C compiler, a folder to write to.
    """
    torch.compile(torch.add)(torch.zeros(2, device=device), 1)


def _filled_up(rows: Tensor) -> Tensor:
    """The rows and zeros behind them."""
    missing = -len(rows) % _PATCHES
    filled = functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
    return _of_any_size(filled, 0)


def _of_any_size(values: Tensor, *dimensions: int) -> Tensor:
    """Channels last, whatever it was, and so marked that code for it fits all lengths of these dimensions."""
    if values.ndim == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    torch._dynamo.maybe_mark_dynamic(values, list(dimensions))
    return values
