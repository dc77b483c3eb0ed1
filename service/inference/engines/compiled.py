"""The `compiled` engine: a network's convolutional parts by `torch.compile`.

A part is compiled for all sizes of pictures and all numbers of patches at once, and once more for a single picture:
torch makes a constant of a length of 1. That is done while the predictor warms up; what comes later and does not fit
(a feature map one cell wide) runs uncompiled.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional

from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.parts import Parts, TrunkOutput, run_trunk

Function = TypeVar("Function", bound=Callable[..., Any])
Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Callable[..., Any]]

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_PATCHES = 128
"""Numbers of patches are rounded up to multiples of this, so that one patch needs no code of its own."""


def keep_compiled_code(folder: Path) -> None:
    """Have torch keep what it compiles in a folder, unless a variable of its own names another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable itself, to a folder below /tmp, as soon as some of its modules are imported.
    if os.environ.get(_CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[_CACHE_VARIABLE] = str(folder / "inductor")


class CompiledNetwork:
    """The parts of one network. Each compiles itself when it meets a shape that its code does not fit.

    Args:
        model: in evaluation mode, on its device.
        backend: of `torch.compile`.
    """

    def __init__(self, model: GeneralizedRCNN, *, backend: str | Backend = "inductor") -> None:
        # Imported here: it takes a second, which other engines need not wait for.
        from torch._dynamo.backends.registry import lookup_backend

        self._backend = cast(Backend, lookup_backend(backend))
        self._compilations: Counter[str] = Counter()
        own, backbone, rpn_head = model.own_parts(), model.backbone, model.rpn.head
        own_box_head, own_mask_head = own.box_head, own.mask_head

        def run_the_trunk(batch: Tensor) -> TrunkOutput:
            return run_trunk(backbone, rpn_head, batch)

        def run_the_backbone(batch: Tensor) -> Mapping[str, Tensor]:
            maps: Mapping[str, Tensor] = backbone(batch)
            return maps

        def run_the_box_head(pooled: Tensor) -> tuple[Tensor, Tensor]:
            return own_box_head(pooled)

        def run_the_mask_head(pooled: Tensor, labels: Tensor) -> Tensor:
            assert own_mask_head is not None
            return own_mask_head(pooled, labels)

        self._trunk = self._compiled("trunk", run_the_trunk)
        self._backbone = self._compiled("backbone", run_the_backbone)
        self._box_head = self._compiled("box head", run_the_box_head)
        self._mask_head = self._compiled("mask head", run_the_mask_head)
        self._needed = {
            "trunk" if model.has_rpn else "backbone",
            "box head",
            *(() if own_mask_head is None else ("mask head",)),
        }

    def parts(self) -> Parts:
        """What runs each part."""
        return Parts(
            trunk=self.run_trunk,
            backbone=self.run_backbone,
            box_head=self.run_box_head,
            mask_head=self.run_mask_head if "mask head" in self._needed else None,
        )

    @property
    def uncompiled(self) -> list[str]:
        """The parts that every batch needs and that nothing was compiled for; to be asked after a batch."""
        return sorted(self._needed - self._compilations.keys())

    def run_trunk(self, batch: Tensor) -> TrunkOutput:
        """See `Parts.trunk`."""
        return self._trunk(_of_any_size(batch, 0, 2, 3))

    def run_backbone(self, batch: Tensor) -> Mapping[str, Tensor]:
        """See `Parts.backbone`."""
        return self._backbone(_of_any_size(batch, 0, 2, 3))

    def run_box_head(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parts.box_head`."""
        class_logits, box_regression = self._box_head(_filled_up(pooled))
        return class_logits[: len(pooled)], box_regression[: len(pooled)]

    def run_mask_head(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """See `Parts.mask_head`."""
        return self._mask_head(_filled_up(pooled), _filled_up(labels))[: len(pooled)]

    def _compiled(self, part: str, function: Function) -> Function:
        backend, compilations = self._backend, self._compilations

        # Knows nothing of the network, for dynamo never lets go of a backend.
        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            run = backend(graph, inputs)
            compilations[part] += 1
            return run

        # dynamo keeps what it compiled by code object, and compiles no more for one that has `recompile_limit` entries.
        # The same function of every network would share one. With an object of its own, each network has its own
        # entries, and they go when it goes.
        code = function.__code__.replace()
        own = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
        return cast(Function, torch.compile(own, backend=compile_graph))


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
