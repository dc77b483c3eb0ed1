"""Encodes detections as named arrays, for protocols that write tensors themselves: masks are not spread over their
boxes, and nothing is turned into text. `service.tensors.read_tensors` gives the arrays back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from service.answers.encoder import Encoder
from service.structures import Detections, Image, ModelInfo
from service.tensors import write_tensors


class TensorsEncoder(Encoder):
    """See the module."""

    def encode(
        self, image: Image, part: Detections, info: ModelInfo, *, should_stop: Callable[[], bool]
    ) -> Iterator[bytes]:
        """`boxes`, `labels`, `scores`, then `masks` and further outputs if there are any; see `Detections`."""
        yield write_tensors(part.arrays())
