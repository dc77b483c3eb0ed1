"""The `openvino` engine: a network's convolutional parts compiled by OpenVINO for the CPU. Compiled parts are cached on
disk for the next start; nothing else is written, and nothing is sent over the network.

A part has a graph for inputs of any size. The trunk also gets graphs for the picture sizes that come most often, since
OpenVINO runs a graph of fixed size faster: it leaves out copies that only change the layout of the feature maps.

Shapes: see `service/modeling/parts.py`. OpenVINO takes patches and returns feature maps channels last, like the kernels
of `ops`, and shares the tensors' memory instead of copying.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import openvino
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from service.inference.engines.int8 import of_backbone, put_quantizers, simplify
from service.inference.engines.openvino_graphs import GraphsBySize, Head, OneGraph
from service.model_store.quantizers import Part, PartQuantizers, Quantizers
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.parts import Parts, TrunkOutput, run_trunk
from service.modeling.poolers import RoIPooler

logger = logging.getLogger(__name__)

PRECISION_HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}
"""OpenVINO's names; in int8, of what the quantisers leave. Without a hint it uses bfloat16 wherever the processor
supports it.
"""

_DIGEST_BYTES = 32
_PACKAGES = ("roiserve", "openvino", "torch", "torchvision", "timm")
"""Packages whose versions affect a compiled part."""
_ROOMS = ("modeling", "inference/engines")
"""The code that a part is made of and called by."""
_EXAMPLE_SIDE = 128
# Patches per call of a head: about as many as fit in the processor's caches together with the activations. This makes
# the box head a tenth faster on a thousand patches, and the mask head slightly faster on a hundred.
_BOX_PATCHES = 500
_MASK_PATCHES = 25
_FIXED_SIZE = {"SNIPPETS_MODE": "DISABLE"}
"""Otherwise OpenVINO rounds to int8 by other code than in a graph for any size, and gets other results."""

Shape = Sequence[int]

_convert_one_at_a_time = Lock()  # torch's tracing keeps state in a module


def has_bfloat16() -> bool:
    """Whether the processor multiplies in bfloat16. If it does not, OpenVINO silently runs in float32."""
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def has_int8() -> bool:
    """Whether the processor has instructions for sums of products in int8 (VNNI, AMX). Without them int8 is hardly
    faster, and AVX2's own instructions clip pairs of products, which changes answers.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return not {"avx512_vnni", "avx_vnni", "amx_int8"}.isdisjoint(text.split())


class OpenVinoNetwork:
    """The parts of one network.

    Args:
        model: in evaluation mode, on the CPU, in float32; it is not changed.
        key: names its weights and configuration.
        precision: one of `PRECISION_HINTS`.
        cache_dir: where compiled parts are kept; made if missing.
        quantizers: what runs in int8; nothing by default.
    """

    def __init__(
        self,
        model: GeneralizedRCNN,
        *,
        key: str,
        precision: str,
        cache_dir: Path,
        quantizers: Quantizers | None = None,
    ) -> None:
        self._model = model
        self._own = model.own_parts()
        self._quantizers = quantizers or Quantizers()
        self._compiler = _Compiler(key=(key, self._quantizers.sha256), precision=precision, cache_dir=cache_dir)
        self._picture_shape = (-1, model.transform.num_channels, -1, -1)
        example = torch.zeros(1, model.transform.num_channels, _EXAMPLE_SIDE, _EXAMPLE_SIDE)
        with torch.inference_mode():
            maps = model.backbone(example)
        self._names = list(maps)
        self._channels = maps[self._names[0]].shape[1]
        sides = [maps[name].shape[-1] for name in model.roi_heads.box_roi_pool.strides]
        self._halves_sides = model.transform.size_divisible % (_EXAMPLE_SIDE // sides[-1]) == 0 and all(
            side == 2 * next_side for side, next_side in pairwise(sides)
        )
        self._weight_bytes = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))

    def parts(self) -> Parts:
        """Compile what every batch needs.

        Raises:
            RuntimeError: OpenVINO cannot express a part.
        """
        has_rpn, has_masks = self._model.rpn.head is not None, self._own.mask_head is not None
        _ = self._trunk if has_rpn else self._backbone, self._box_head, self._mask_head if has_masks else None
        return Parts(
            trunk=self.run_trunk,
            backbone=self.run_backbone,
            box_head=self.run_box_head,
            mask_head=self.run_mask_head if has_masks else None,
        )

    def run_trunk(self, batch: Tensor) -> TrunkOutput:
        """See `Parts.trunk`."""
        *maps, objectness, deltas = self._trunk(batch)
        return TrunkOutput(self._named(maps), objectness, deltas)

    def run_backbone(self, batch: Tensor) -> Mapping[str, Tensor]:
        """See `Parts.backbone`."""
        return self._named(self._backbone(batch))

    def run_box_head(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """See `Parts.box_head`."""
        if not len(pooled):
            return self._own.box_head(pooled)
        class_logits, box_regression = self._box_head(pooled.permute(0, 2, 3, 1))
        return class_logits, box_regression

    def run_mask_head(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """See `Parts.mask_head`."""
        if not len(pooled):
            assert self._own.mask_head is not None
            return self._own.mask_head(pooled, labels)
        return self._mask_head(pooled.permute(0, 2, 3, 1), labels)[0]

    def _named(self, maps: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return {name: one.permute(0, 3, 1, 2) for name, one in zip(self._names, maps, strict=True)}

    def graph(self, part: Part) -> Any:
        """A part as an `openvino.Model` in float32, in the form that quantisers are chosen for.

        Raises:
            RuntimeError: OpenVINO cannot express it.
        """
        return self._simplified(*self._module(part))

    def _simplified(self, module: nn.Module, shapes: Sequence[Shape]) -> Any:
        graph = _converted(module, shapes)
        simplify(graph, halves_sides=self._halves_sides)
        return graph

    @cached_property
    def _trunk(self) -> GraphsBySize:
        module, shapes = self._module("trunk")
        graph = partial(self._graph, module, shapes, self._quantizers.trunk)
        return GraphsBySize(
            self._compiler.load("trunk", graph),
            lambda shape: self._compiler.compile(graph(), [shape]),
            weight_bytes=self._weight_bytes,
        )

    @cached_property
    def _backbone(self) -> OneGraph:
        """Compiled for the first batch that needs it: most servers never get one."""
        quantizers = of_backbone(self._quantizers.trunk)
        graph = partial(self._graph, _Backbone(self._model), [self._picture_shape], quantizers)
        return OneGraph(self._compiler.load("backbone", graph))

    @cached_property
    def _box_head(self) -> Head:
        graph = partial(self._graph, *self._module("box_head"), self._quantizers.box_head)
        return Head(OneGraph(self._compiler.load("box_head", graph)), rows=_BOX_PATCHES)

    @cached_property
    def _mask_head(self) -> Head:
        module, shapes = self._module("mask_head")
        graph = partial(self._graph, module, shapes, self._quantizers.mask_head)
        for_any_number = OneGraph(self._compiler.load("mask_head", graph))
        for_whole_chunks = None
        # An OpenVINO that does not know the setting for fixed sizes is only slower.
        with suppress(RuntimeError):
            whole = [(_MASK_PATCHES, *shape[1:]) for shape in shapes]
            for_whole_chunks = OneGraph(self._compiler.load(f"mask_head-{_MASK_PATCHES}", graph, whole))
        return Head(for_any_number, rows=_MASK_PATCHES, for_whole_chunks=for_whole_chunks)

    def _graph(self, module: nn.Module, shapes: Sequence[Shape], quantizers: PartQuantizers) -> Any:
        if not quantizers.layers:
            return _converted(module, shapes)
        graph = self._simplified(module, shapes)
        put_quantizers(graph, quantizers)
        return graph

    def _module(self, part: Part) -> tuple[nn.Module, Sequence[Shape]]:
        """What computes a part, and the shapes of its inputs."""
        heads = self._model.roi_heads
        match part:
            case "trunk":
                return _Trunk(self._model), [self._picture_shape]
            case "box_head":
                return _Patches(self._own.box_head), [self._patch_shape(heads.box_roi_pool)]
            case "mask_head":
                return _Patches(self._own.mask_head), [self._patch_shape(heads.mask_roi_pool), (-1,)]

    def _patch_shape(self, pooler: RoIPooler) -> Shape:
        size = pooler.output_size
        return (-1, *((size, size) if isinstance(size, int) else (sum(side**2 for side in size), 1)), self._channels)


class _Trunk(nn.Module):
    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.rpn_head = model.rpn.head

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        output = run_trunk(self.backbone, self.rpn_head, batch)
        return (*(one.permute(0, 2, 3, 1) for one in output.features.values()), output.objectness, output.deltas)


class _Backbone(nn.Module):
    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        return tuple(one.permute(0, 2, 3, 1) for one in self.backbone(batch).values())


class _Patches(nn.Module):
    """A head whose patches come channels last; its other inputs are passed on unchanged."""

    def __init__(self, head: object) -> None:
        super().__init__()
        assert isinstance(head, nn.Module)  # the network's own parts are
        self.head = head

    def forward(self, pooled: Tensor, *others: Tensor) -> Any:
        return self.head(pooled.permute(0, 3, 1, 2), *others)


class _Compiler:
    """Compiles parts, or loads them from disk. Each is cached in a file that begins with the SHA-256 of the rest."""

    def __init__(self, *, key: object, precision: str, cache_dir: Path) -> None:
        self._core = openvino.Core()
        self._config = {
            "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            # Threads of several models and processes share the cores; pinned ones would all sit on the first.
            "ENABLE_CPU_PINNING": False,
        }
        self._cache_dir = cache_dir
        processor = self._core.get_property("CPU", "FULL_DEVICE_NAME")
        made_for = (key, _versions(), _sources_sha256(), platform.machine(), processor, self._config)
        self._key = hashlib.sha256(repr(made_for).encode()).hexdigest()[:32]

    def load(self, part: str, make_graph: Callable[[], Any], shapes: Sequence[Shape] | None = None) -> Any:
        """Read a compiled part from disk, or compile and keep it.

        Args:
            part: its name.
            make_graph: makes it as an `openvino.Model`.
            shapes: the only shapes of its inputs; None for any.

        Raises:
            UnfitQuantizersError: the quantisers were made for another graph.
            RuntimeError: OpenVINO cannot express it.
        """
        file = self._cache_dir / f"{self._key}-{part}.openvino"
        compiled = self._read(file)
        if compiled is None:
            compiled = self.compile(make_graph(), shapes)
            blob = io.BytesIO()
            compiled.export_model(blob)
            _write(file, blob.getvalue())
        return compiled

    def compile(self, graph: Any, shapes: Sequence[Shape] | None = None) -> Any:
        """Compile a graph; `shapes` as above."""
        if shapes is None:
            return self._core.compile_model(graph, "CPU", self._config)
        graph.reshape({port: list(shape) for port, shape in zip(graph.inputs, shapes, strict=True)})
        return self._core.compile_model(graph, "CPU", self._config | _FIXED_SIZE)

    def _read(self, file: Path) -> Any:
        """The compiled part in a file; None if the file is missing, damaged or unreadable."""
        try:
            data = np.fromfile(file, np.uint8)
        except OSError:
            return None
        digest, blob = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(blob.data).digest() != digest.tobytes():
            logger.warning("compiled part is damaged, compiling anew", extra={"fields": {"file": str(file)}})
            return None
        try:
            # A copy: OpenVINO keeps using its memory.
            return self._core.import_model(openvino.Tensor(blob), "CPU", self._config)
        except RuntimeError as error:
            fields = {"file": str(file), "reason": str(error)}
            logger.warning("compiled part cannot be read, compiling anew", extra={"fields": fields})
            return None


def _versions() -> list[str | None]:
    """Versions of all `_PACKAGES`; None for an extra that is not installed."""
    found: list[str | None] = []
    for name in _PACKAGES:
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append(None)
    return found


@cache
def _sources_sha256(package: Path = Path(__file__).parents[2]) -> str:
    """Of the files of `_ROOMS`: in a checkout they change under one version of the package."""
    digest = hashlib.sha256()
    for file in sorted(file for room in _ROOMS for file in (package / room).rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _write(file: Path, blob: bytes) -> None:
    """Write under a temporary name first, so that no other process reads a partial file."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished.write_bytes(hashlib.sha256(blob).digest() + blob)
        unfinished.replace(file)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        logger.warning("cannot keep a compiled part", extra={"fields": {"file": str(file), "reason": str(error)}})


def _converted(module: nn.Module, shapes: Sequence[Shape]) -> Any:
    examples = [
        torch.zeros([_example_length(index, length) for index, length in enumerate(shape)], dtype=dtype)
        for shape, dtype in zip(shapes, (torch.float32, torch.int64), strict=False)
    ]
    with _convert_one_at_a_time, warnings.catch_warnings(), torch.no_grad():
        # torch warns that tracing is deprecated, and that dynamic sizes may be recorded as constants.
        warnings.simplefilter("ignore")
        # Not `openvino.convert_model`, which sends telemetry.
        # Tracing is not checked by tracing again, which takes three times as long: the verification compares outputs.
        options = {"check_trace": False}
        decoder = TorchScriptPythonDecoder(module.eval(), example_input=tuple(examples), trace_kwargs=options)
        frontend = FrontEndManager().load_by_framework("pytorch")
        try:
            converted = frontend.convert(frontend.load(decoder))
        except Exception as error:
            # Ctrl-C that comes while OpenVINO calls the decoder, which is Python, looks like a failed conversion.
            if "KeyboardInterrupt" in str(error):
                raise KeyboardInterrupt from None
            raise
    for port, shape, example in zip(converted.inputs, shapes, examples, strict=True):
        node = port.get_node()
        node.set_partial_shape(openvino.PartialShape(list(shape)))
        node.set_element_type(openvino.Type(example.numpy().dtype))
    converted.validate_nodes_and_infer_types()
    return converted


def _example_length(index: int, length: int) -> int:
    if length != -1:
        return length
    return 2 if index == 0 else _EXAMPLE_SIDE
