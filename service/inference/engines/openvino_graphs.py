"""Compiled OpenVINO graphs, ready to run. They share tensors' memory instead of copying it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from threading import Thread
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor

from service.errors import first_line
from service.inference.engines.frequent_sizes import FrequentSizes, Size
from service.memory import available_bytes

logger = logging.getLogger(__name__)

_OWN_GRAPHS = 4
"""Graphs for one size, of a part. A trunk's takes some 40 MB for the bundled models, and 400 MB for a ResNet-50 in
float32 at 800 x 1088.
"""
_MEMORY_PER_OUTPUT = 6
"""A graph needs memory for its weights and, at most, this many times its outputs: measured for the above."""
_LEAST_SPARE_MEMORY = 4
"""No further graph is made if so many of them would not fit the memory that is left."""

Floats = NDArray[np.float32]
Shape = Sequence[int]


class OneGraph:
    """One part, ready to run; called by one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._outputs = range(len(compiled.outputs))

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the part. The outputs lie in OpenVINO's memory and are valid until the next call."""
        self._request.infer([_shared(one) for one in inputs], share_inputs=True, share_outputs=True)
        return [torch.from_numpy(self._request.get_output_tensor(index).data) for index in self._outputs]


class Head:
    """A head that takes patches in chunks.

    Args:
        for_any_number: of patches.
        rows: of a whole chunk.
        for_whole_chunks: faster on a whole chunk, with the same results; None if there is no such graph.
    """

    def __init__(self, for_any_number: OneGraph, *, rows: int, for_whole_chunks: OneGraph | None = None) -> None:
        self._for_any_number = for_any_number
        self._rows = rows
        self._for_whole_chunks = for_whole_chunks or for_any_number

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Run the head. With more than one chunk, the outputs get memory of their own; else see `OneGraph`."""
        count, rows = len(inputs[0]), self._rows
        if count < rows:
            return self._for_any_number(*inputs)
        if count == rows:
            return self._for_whole_chunks(*inputs)
        whole: list[Tensor] = []
        for start in range(0, count, rows):
            outputs = self(*(one[start : start + rows] for one in inputs))
            whole = whole or [one.new_empty(count, *one.shape[1:]) for one in outputs]
            for target, output in zip(whole, outputs, strict=True):
                target[start : start + rows] = output
        return whole


class GraphsBySize:
    """The trunk; called by one thread at a time.

    A graph for one size is compiled in a thread of its own while batches go on, and takes over once it has been seen to
    give the same outputs, bit for bit. It runs the pictures of a batch one by one, which is as fast.

    Args:
        compiled: for batches of any shape.
        compile_for: compiles for batches of one shape.
        weight_bytes: size of the weights.
    """

    def __init__(self, compiled: Any, compile_for: Callable[[Shape], Any], *, weight_bytes: int) -> None:
        self._compiled = compiled
        self._for_any_size = OneGraph(compiled)
        self._compile_for = compile_for
        self._weight_bytes = weight_bytes
        self._sizes = FrequentSizes(_OWN_GRAPHS)
        self._graphs: dict[Size, _OneSize] = {}
        self._thread: Thread | None = None
        self._memory: list[Floats] = []

    def __call__(self, batch: Tensor) -> list[Tensor]:
        """Run the trunk. The outputs are valid until the next call."""
        size = (batch.shape[2], batch.shape[3])
        graph = self._graphs.get(size)
        self._sizes.count(size, len(batch))
        if graph is not None:
            return graph(batch, self._memory)
        outputs = self._for_any_size(batch)
        if (self._thread is None or not self._thread.is_alive()) and self._sizes.choose(size):
            self._graphs = {kept: one for kept, one in self._graphs.items() if kept in self._sizes.chosen}
            output_bytes = sum(one.nbytes for one in outputs) // len(batch)
            if self._fits(self._weight_bytes + _MEMORY_PER_OUTPUT * output_bytes):
                # Not a daemon: Python would be finalized while OpenVINO compiles.
                self._thread = Thread(target=self._make, args=(size, batch[:1].clone()), name="compile")
                self._thread.start()
        return outputs

    def _fits(self, needed: int) -> bool:
        left = available_bytes()
        if left is None or _LEAST_SPARE_MEMORY * needed <= left:
            return True
        logger.info("no memory for a faster graph", extra={"fields": {"needed": needed, "left": left}})
        return False

    def _make(self, size: Size, picture: Tensor) -> None:
        """Compile for a size, and try it on a picture."""
        try:
            graph = _OneSize(self._compile_for(picture.shape))
            expected = OneGraph(self._compiled)(picture)
            if not all(map(torch.equal, graph(picture, []), expected)):
                raise RuntimeError("its outputs differ")
        except Exception as error:  # OpenVINO's differ by what is wrong
            fields = {"size": size, "reason": first_line(error)}
            logger.info("no graph for this size of picture", extra={"fields": fields})
        else:
            self._graphs[size] = graph


class _OneSize:
    """A graph for one picture of one size; called by one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._shapes = [tuple(port.shape)[1:] for port in compiled.outputs]

    def __call__(self, batch: Tensor, memory: list[Floats]) -> list[Tensor]:
        """Run it on each picture of a batch.

        Args:
            memory: of earlier outputs, which may be overwritten; replaced where it is too small.
        """
        count = len(batch)
        lengths = [count * math.prod(shape) for shape in self._shapes]
        if len(memory) != len(lengths) or any(len(one) < length for one, length in zip(memory, lengths, strict=True)):
            memory[:] = [np.empty(length, np.float32) for length in lengths]
        outputs = [
            one[:length].reshape(count, *shape)
            for one, length, shape in zip(memory, lengths, self._shapes, strict=True)
        ]
        for index in range(count):
            self._request.set_input_tensor(0, _shared(batch[index : index + 1]))
            for port, output in enumerate(outputs):
                one = openvino.Tensor(output[index : index + 1], shared_memory=True)
                self._request.set_output_tensor(port, one)
            self._request.infer(share_inputs=True, share_outputs=True)
        return [torch.from_numpy(one) for one in outputs]


def _shared(tensor: Tensor) -> Any:
    """An `openvino.Tensor` in the same memory, if it is contiguous."""
    return openvino.Tensor(tensor.contiguous().numpy(), shared_memory=True)
