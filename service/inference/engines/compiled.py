"""The `compiled` engine: a network's convolutional parts by `torch.compile`.

Each part is compiled once for all image sizes and patch counts, and once more for a single image, because torch treats
a length of 1 as a constant. Both happen while the predictor warms up. Later inputs that fit neither (a feature map one
cell wide) run uncompiled, as does everything while the process has another number of threads, autocast or TF32 than
when it warmed up: torch checks them at each call. `take_uncompiled` tells.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
"""Patch counts are rounded up to a multiple of this, so that a single patch needs no separate compilation."""


def keep_compiled_code(folder: Path) -> None:
    """Make torch cache compiled code in a folder, unless `TORCHINDUCTOR_CACHE_DIR` names another one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable itself, to a folder below /tmp, as soon as some of its modules are imported.
    if os.environ.get(_CACHE_VARIABLE) in (None, default_cache_dir()):
        os.environ[_CACHE_VARIABLE] = str(folder / "inductor")


class CompiledNetwork:
    """The parts of one network. Each part recompiles when it meets a shape that its code does not cover.

    Args:
        model: in evaluation mode, on its device.
        backend: passed to `torch.compile`.
    """

    def __init__(self, model: GeneralizedRCNN, *, backend: str | Backend = "inductor") -> None:
        # Imported here: it takes a second, and the other engines don't need it.
        from torch._dynamo.backends.registry import lookup_backend

        self._backend = cast(Backend, lookup_backend(backend))
        self._compilations: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()
        self._ran_uncompiled: set[str] = set()
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
        """The functions that run each part."""
        return Parts(
            trunk=self.run_trunk,
            backbone=self.run_backbone,
            box_head=self.run_box_head,
            mask_head=self.run_mask_head if "mask head" in self._needed else None,
        )

    @property
    def uncompiled(self) -> list[str]:
        """Parts that every batch needs but that were never compiled. Read it after a batch."""
        return sorted(self._needed - self._compilations.keys())

    def take_uncompiled(self) -> list[str]:
        """Parts that ran uncompiled since the last call of this method."""
        parts, self._ran_uncompiled = sorted(self._ran_uncompiled), set()
        return parts

    def run_trunk(self, batch: Tensor) -> TrunkOutput:
        """See `Parts.trunk`."""
        with self._watched("trunk"):
            return self._trunk(_of_any_size(batch, 0, 2, 3))

    def run_backbone(self, batch: Tensor) -> Mapping[str, Tensor]:
        """See `Parts.backbone`."""
        with self._watched("backbone"):
            return self._backbone(_of_any_size(batch, 0, 2, 3))

    def run_box_head(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parts.box_head`."""
        with self._watched("box head"):
            class_logits, box_regression = self._box_head(_filled_up(pooled))
        return class_logits[: len(pooled)], box_regression[: len(pooled)]

    def run_mask_head(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """See `Parts.mask_head`."""
        with self._watched("mask head"):
            return self._mask_head(_filled_up(pooled), _filled_up(labels))[: len(pooled)]

    @contextmanager
    def _watched(self, part: str) -> Iterator[None]:
        """Notice whether a call of this part runs compiled code."""
        runs = self._runs[part]
        yield
        if self._runs[part] == runs:
            self._ran_uncompiled.add(part)

    def _compiled(self, part: str, function: Function) -> Function:
        backend, compilations, runs = self._backend, self._compilations, self._runs

        # Must not reference the network: dynamo never releases a backend.
        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            run = backend(graph, inputs)
            compilations[part] += 1

            def run_and_count(*values: Any) -> Any:
                runs[part] += 1
                return run(*values)

            return run_and_count

        # dynamo caches compiled code per code object, and stops compiling for one that has `recompile_limit` entries.
        # All networks would share the code object of this function, so each gets its own copy; its cache entries are
        # freed with the network.
        code = function.__code__.replace()
        own = FunctionType(code, function.__globals__, function.__name__, None, function.__closure__)
        return cast(Function, torch.compile(own, backend=compile_graph))


def _filled_up(rows: Tensor) -> Tensor:
    """The rows, padded with zero rows to a multiple of `_PATCHES`, at least one."""
    missing = -len(rows) % _PATCHES if len(rows) else _PATCHES
    filled = functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, missing)) if missing else rows
    return _of_any_size(filled, 0)


def _of_any_size(values: Tensor, *dimensions: int) -> Tensor:
    """The values in channels-last memory, with these dimensions marked as dynamic for the compiler."""
    if values.ndim == 4:
        values = values.contiguous(memory_format=torch.channels_last)
    torch._dynamo.maybe_mark_dynamic(values, list(dimensions))
    return values
