"""What could run in int8 in a part, and between which values: NNCF places the quantisers, takes the ranges from
recorded inputs, and corrects biases. What it found is read off its graph; nothing else of it is kept.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from service.errors import ServiceError
from service.inference.engines.int8 import bias_of, constant_of
from service.model_store.quantizers import ActivationRange, Int8Layer, Part, PartQuantizers
from service.training.quantization.calibration import Array

# The last layers, whose outputs are probabilities and boxes: a small share of the work, and the share that shows.
_STAYS_FLOAT = ("self.rpn_head.cls_logits.", "self.rpn_head.bbox_pred.", "self.head.predictor.")
# By part: what the conversion calls the network's modules, and what they are called in its state.
_PREFIXES: Mapping[Part, Mapping[str, str]] = {
    "trunk": {"self.backbone.": "backbone.", "self.rpn_head.": "rpn.head."},
    # `folding.py` wraps a head that flattens patches, whose weights are then in another order, row by row.
    "box_head": {
        "self.head.head.flattens.": "roi_heads.box_head.",
        "self.head.head.": "roi_heads.box_head.",
    },
    "mask_head": {"self.head.head.": "roi_heads.mask_head."},
}


class Proposal(BaseModel):
    """All that could run in int8 in one part.

    Attributes:
        quantizers: with every layer in int8.
        names: of each layer's operation. Operations with the same weights are one layer.
        owners: the layer that each rounded input (`operation:index`) belongs to: the one that takes it, or, where an
            addition or a pooling does, the one that computed it, or, where none did, the next one.
    """

    model_config = ConfigDict(frozen=True)

    quantizers: PartQuantizers = PartQuantizers()
    names: dict[str, str] = {}
    owners: dict[str, str] = {}

    @property
    def layers(self) -> Sequence[str]:
        """The names of the layers, in the order in which they run."""
        return list(dict.fromkeys(self.names[layer.operation] for layer in self.quantizers.layers))

    def only(self, layers: frozenset[str]) -> PartQuantizers:
        """The quantisers of some layers."""
        return PartQuantizers(
            layers=tuple(layer for layer in self.quantizers.layers if self.names[layer.operation] in layers),
            activations=tuple(
                one.model_copy(update={"into": inputs})
                for one in self.quantizers.activations
                if (inputs := tuple(name for name in one.into if self.owners[name] in layers))
            ),
        )


def check_installed() -> None:
    """Check that NNCF can be imported.

    Raises:
        ServiceError: it is not installed.
    """
    try:
        _nncf()
    except ImportError as error:
        raise ServiceError(
            f"quantising needs NNCF, which cannot be imported ({error}): "
            "pip install --constraint constraints.txt '.[quantize]'"
        ) from error


def propose(
    part: Part,
    graph: Any,
    calls: Callable[[], Iterator[tuple[Array, ...]]],
    *,
    count: int,
    state: Mapping[str, Tensor],
    advance: Callable[[], None],
) -> Proposal:
    """Find what could run in int8.

    Args:
        graph: the part's, simplified, in float32.
        calls: the recorded inputs from the beginning, at each call.
        count: how many there are.
        state: the network's weights, by key.
        advance: called after each input; all of them are gone through several times.
    """
    if not count:
        return Proposal()
    nncf = _nncf()

    def fed() -> Iterator[tuple[Array, ...]]:
        for inputs in calls():
            yield inputs
            advance()

    stays = [
        one.get_friendly_name()
        for one in graph.get_ops()
        if one.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
        if (constant := constant_of(one)) is None or constant.get_friendly_name().startswith(_STAYS_FLOAT)
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        quantised = nncf.quantize(
            graph,
            nncf.Dataset(_Again(fed)),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            target_device=nncf.TargetDevice.CPU,
            subset_size=count,
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=stays),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                quantize_outputs=False,
                # It halves weights for processors without VNNI, where int8 is not chosen.
                overflow_fix=nncf.OverflowFix.DISABLE,
            ),
        )
    return _read(part, graph, quantised, state)


class _Again:
    """An iterable that begins anew whenever it is gone through."""

    def __init__(self, begin: Callable[[], Iterator[tuple[Array, ...]]]) -> None:
        self._begin = begin

    def __iter__(self) -> Iterator[tuple[Array, ...]]:
        return self._begin()


def _nncf() -> Any:
    # Imported here: an optional extra that takes a second. `service.inference` keeps its telemetry from being imported.
    import nncf

    # Not by `nncf.set_log_level`, which also sets the level of all handlers of its logger, whoever attached them.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _read(part: Part, graph: Any, quantised: Any, state: Mapping[str, Tensor]) -> Proposal:
    plain = {one.get_friendly_name(): one for one in graph.get_ops()}
    layers, names = [], {}
    for operation in quantised.get_ordered_ops():
        original = plain.get(operation.get_friendly_name())
        if original is None or (constant := constant_of(original)) is None or constant_of(operation) is not None:
            continue  # no weights, or not rounded
        key = _state_key(part, constant, state)
        layers.append(
            Int8Layer(operation=original.get_friendly_name(), weight=key, bias_shift=_bias_shift(original, operation))
        )
        names[original.get_friendly_name()] = (key or original.get_friendly_name()).removesuffix(".weight")
    activations, owners = [], {}
    for rounding in quantised.get_ordered_ops():
        if rounding.get_type_name() != "FakeQuantize" or _rounds_a_constant(rounding):
            continue
        source = rounding.input_value(0)
        targets = [
            target
            for target in rounding.output(0).get_target_inputs()
            if target.get_node().get_type_name() != "ShapeOf"
        ]
        above = _layer_above(source.get_node(), names)
        for target in targets:
            node = target.get_node()
            owner = names.get(node.get_friendly_name()) or above or _layer_below(node, names)
            if owner is not None:
                owners[f"{node.get_friendly_name()}:{target.get_index()}"] = owner
        into = sorted(f"{one.get_node().get_friendly_name()}:{one.get_index()}" for one in targets)
        if into := [name for name in into if name in owners]:
            low, high = (_levels(rounding.input_value(index).get_node().get_data()) for index in (1, 2))
            after = f"{source.get_node().get_friendly_name()}:{source.get_index()}"
            activations.append(ActivationRange(after=after, into=tuple(into), low=low, high=high))
    return Proposal(
        quantizers=PartQuantizers(layers=tuple(layers), activations=tuple(activations)), names=names, owners=owners
    )


def _levels(levels: Array) -> float | tuple[float, ...]:
    """A number, or one for each channel, as depthwise convolutions want them."""
    numbers = [float(level) for level in levels.ravel()]
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _rounds_a_constant(rounding: Any) -> bool:
    """Whether it rounds a constant, such as weights."""
    node = rounding.input_value(0).get_node()
    while node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def _layer_above(node: Any, names: Mapping[str, str]) -> str | None:
    """The nearest layer in int8 that a value comes from, by the first inputs."""
    while True:
        if node.get_friendly_name() in names:
            return names[node.get_friendly_name()]
        if not node.inputs():
            return None
        node = node.input_value(0).get_node()


def _layer_below(node: Any, names: Mapping[str, str]) -> str | None:
    """The nearest layer in int8 that a value goes to, by the first outputs."""
    while True:
        if node.get_friendly_name() in names:
            return names[node.get_friendly_name()]
        targets = [target for output in node.outputs() for target in output.get_target_inputs()]
        if not targets:
            return None
        node = targets[0].get_node()


def _state_key(part: Part, constant: Any, state: Mapping[str, Tensor]) -> str | None:
    """The key of weights in the network's state; None if they are not there row by row."""
    name: str = constant.get_friendly_name()
    for prefix, replacement in _PREFIXES[part].items():
        key = replacement + name.removeprefix(prefix)
        if name.startswith(prefix) and key in state and state[key].numel() == constant.get_data().size:
            return key
    return None


def _bias_shift(original: Any, corrected: Any) -> tuple[float, ...]:
    before, after = bias_of(original), bias_of(corrected)
    if before is None or after is None:
        return ()
    shift = (_bias(after) - _bias(before)).ravel()
    return tuple(float(f"{value:.6g}") for value in shift) if np.any(shift) else ()


def _bias(addition: Any) -> Array:
    values: Array = addition.input_value(1).get_node().get_data().astype(np.float64)
    return values
