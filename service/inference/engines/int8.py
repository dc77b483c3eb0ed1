"""Put the quantisers of a stored version (`service/model_store/quantizers.py`) into the graph of a part. OpenVINO then
runs what lies between them in int8, with sums in int32.

The graph and the quantisers come from the same versions of torch and OpenVINO, or they may not fit: operations are
found by the names that the conversion gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from openvino import opset13 as operations
from openvino._offline_transformations import apply_moc_transformations

from service.model_store.quantizers import ActivationRange, Int8Layer, PartQuantizers

_WEIGHT_LEVELS = 255
_ACTIVATION_LEVELS = 256
_WEIGHTED = ("Convolution", "GroupConvolution", "MatMul")
_RPN_HEAD = "__module.rpn_head"


class UnfitQuantizersError(RuntimeError):
    """Quantisers that were made for another graph."""


def simplify(graph: Any, *, halves_sides: bool) -> None:
    """Fold constants and drop what has no effect, in place. Quantisers are chosen for graphs in this form.

    Args:
        graph: an `openvino.Model`.
        halves_sides: whether each feature map has exactly half the sides of the next finer one. Then upsampling is by a
            constant factor, and OpenVINO does it in int8 even if the graph is for any size, with the same results as in
            one for a fixed size.
    """
    apply_moc_transformations(graph, cf=True)
    if halves_sides:
        for operation in graph.get_ops():
            if operation.get_type_name() == "Interpolate":
                _upsample_twofold(operation)


def _upsample_twofold(operation: Any) -> None:
    given = operation.get_attributes()
    twofold = operations.interpolate(
        operation.input_value(0),
        operations.constant(np.array([2, 2], np.float32)),
        given["mode"],
        "scales",
        coordinate_transformation_mode=given["coordinate_transformation_mode"],
        nearest_mode=given["nearest_mode"],
        axes=operations.constant(np.array([2, 3], np.int64)),
    )
    twofold.set_friendly_name(operation.get_friendly_name())
    operation.output(0).replace(twofold.output(0))


def put_quantizers(graph: Any, quantizers: PartQuantizers) -> None:
    """Round weights and activations in a graph, in place.

    Args:
        graph: an `openvino.Model`, simplified.
        quantizers: made for this graph.

    Raises:
        UnfitQuantizersError: they were not.
    """
    by_name = {one.get_friendly_name(): one for one in graph.get_ops()}
    for layer in quantizers.layers:
        _round_weights(_found(by_name, layer.operation), layer)
    for activation in quantizers.activations:
        _round_activations(by_name, activation)
    graph.validate_nodes_and_infer_types()


def of_backbone(trunk: PartQuantizers) -> PartQuantizers:
    """Those of the trunk without its RPN head: the feature maps stay the same numbers."""
    return PartQuantizers(
        layers=tuple(layer for layer in trunk.layers if not layer.operation.startswith(_RPN_HEAD)),
        activations=tuple(
            one.model_copy(update={"into": inputs})
            for one in trunk.activations
            if not one.after.startswith(_RPN_HEAD)
            if (inputs := tuple(name for name in one.into if not name.startswith(_RPN_HEAD)))
        ),
    )


def constant_of(operation: Any) -> Any:
    """The node of an operation's constant weights; None if it has none."""
    if operation.get_type_name() not in _WEIGHTED:
        return None
    source = operation.input_value(1).get_node()
    return source if source.get_type_name() == "Constant" else None


def bias_of(operation: Any) -> Any:
    """The addition of a constant to a layer's output; None if there is none."""
    for target in operation.output(0).get_target_inputs():
        addition = target.get_node()
        if addition.get_type_name() == "Add" and addition.input_value(1).get_node().get_type_name() == "Constant":
            return addition
    return None


def _found(by_name: Mapping[str, Any], name: str) -> Any:
    if name not in by_name:
        raise UnfitQuantizersError(f"the quantisers were made for a graph with {name!r}, which this one lacks")
    return by_name[name]


def _round_weights(operation: Any, layer: Int8Layer) -> None:
    constant = constant_of(operation)
    if constant is None:
        raise UnfitQuantizersError(f"{layer.operation!r} has no constant weights to round")
    weights = constant.get_data()
    largest = np.abs(weights).max(axis=_summed_axes(operation, weights.ndim), keepdims=True)
    largest = np.where(largest > 0, largest, 1).astype(np.float32)
    rounded = operations.fake_quantize(constant, -largest, largest, -largest, largest, _WEIGHT_LEVELS)
    operation.input(1).replace_source_output(rounded.output(0))
    if layer.bias_shift:
        _shift_bias(operation, layer)


def _summed_axes(operation: Any, dimensions: int) -> tuple[int, ...]:
    """The axes of the weights over which an output channel sums."""
    match operation.get_type_name():
        case "Convolution":
            return tuple(range(1, dimensions))
        case "GroupConvolution":  # (groups, outputs of one group, inputs of one group, ...)
            return tuple(range(2, dimensions))
        case _:
            return (dimensions - 1,) if operation.get_attributes()["transpose_b"] else (dimensions - 2,)


def _shift_bias(operation: Any, layer: Int8Layer) -> None:
    addition = bias_of(operation)
    if addition is None:
        raise UnfitQuantizersError(f"{layer.operation!r} has no bias to shift")
    bias = addition.input_value(1).get_node().get_data()
    if bias.size != len(layer.bias_shift):
        raise UnfitQuantizersError(f"{layer.operation!r} has {bias.size} outputs, not {len(layer.bias_shift)}")
    shift = np.asarray(layer.bias_shift, np.float32).reshape(bias.shape)
    addition.input(1).replace_source_output(operations.constant(bias + shift).output(0))


def _round_activations(by_name: Mapping[str, Any], activation: ActivationRange) -> None:
    name, _, index = activation.after.rpartition(":")
    output = _found(by_name, name).output(int(index))
    low, high = (np.array(levels, np.float32) for levels in (activation.lows, activation.highs))
    if len(low) > 1:
        channels = output.get_partial_shape()[1]
        if not channels.is_static or channels.get_length() != len(low):
            raise UnfitQuantizersError(f"{activation.after!r} has {channels} channels, not {len(low)}")
        low, high = (levels.reshape(1, -1, 1, 1) for levels in (low, high))
    rounded = operations.fake_quantize(output, low, high, low, high, _ACTIVATION_LEVELS)
    for target in activation.into:
        name, _, index = target.rpartition(":")
        port = _found(by_name, name).input(int(index))
        if port.get_source_output().get_node().get_friendly_name() != output.get_node().get_friendly_name():
            raise UnfitQuantizersError(f"{target!r} does not come from {activation.after!r}")
        port.replace_source_output(rounded.output(0))
