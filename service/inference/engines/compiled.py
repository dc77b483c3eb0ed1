"""The `compiled` engine: a network's convolutional parts by `torch.compile`, which captures graphs on CUDA. Called by
`choosing.py`. Half precision comes from the autocast around the whole network; boxes are decoded in float32 as with
every engine.

A part is compiled for each shape that it meets, up to torch's limit of eight; what comes after that runs uncompiled.
Shapes are few: a model's padded sizes times sizes of batches, and numbers of patches, which are rounded up here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.parts import Parts, TrunkOutput, run_trunk

_PATCHES = 128
"""Numbers of patches are rounded up to multiples of this."""


def compiled_parts(model: GeneralizedRCNN, *, backend: str = "inductor", mode: str | None = "reduce-overhead") -> Parts:
    """Wrap the parts of a network; each compiles itself when it meets a new shape.

    Args:
        model: in evaluation mode, on its device.
        backend: of `torch.compile`.
        mode: of the backend; `reduce-overhead` captures CUDA graphs.
    """
    own = model.own_parts()
    compile_part = partial(torch.compile, backend=backend, mode=mode, dynamic=False)
    trunk = compile_part(partial(run_trunk, model.backbone, model.rpn.head))
    backbone, box_head = compile_part(model.backbone), compile_part(own.box_head)
    mask_head = None if own.mask_head is None else compile_part(own.mask_head)

    def run_the_trunk(batch: Tensor) -> TrunkOutput:
        # A new batch begins: from here on the last one's memory may be written over.
        torch.compiler.cudagraph_mark_step_begin()
        output: TrunkOutput = trunk(batch)
        return output

    def run_backbone(batch: Tensor) -> Mapping[str, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        maps: Mapping[str, Tensor] = backbone(batch)
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
    return functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
