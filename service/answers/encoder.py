"""What all encoders have in common."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

from service.structures import Detections, Image, ModelInfo


class Encoder(ABC):
    """Encodes answers of one form.

    Attributes:
        smaller: what to ask for instead of an answer that is too large; None if answers of this form need no limit.
        fewer: the options of the form's protocol that make it have fewer detections.
    """

    smaller: str | None = None
    fewer: str = "max_detections or score_thresh"

    def split(self, detections: Detections) -> Sequence[Detections]:
        """Parts that are encoded one by one, in order; at least one."""
        return [detections]

    def least_bytes(self, image_size: tuple[int, int], detections: Detections) -> int:
        """A lower bound on the size of the answer, known before any of it is encoded.

        Args:
            image_size: (height, width).
        """
        return 0

    def left_out(self, detections: Detections) -> int:
        """How many of the detections have labels for which the form has no place."""
        return 0

    @abstractmethod
    def encode(
        self, image: Image, part: Detections, info: ModelInfo, *, should_stop: Callable[[], bool]
    ) -> Iterator[bytes]:
        """Encode one part, piece by piece, so that its caller can stop before there is too much.

        Args:
            info: the model that found them.
            should_stop: polled now and then by work that takes longer than a few milliseconds.

        Raises:
            CancelledRequestError: `should_stop` returned True.
        """

    def join(self, parts: Sequence[Sequence[bytes]]) -> bytes:
        """The answer, from the pieces of its parts in order."""
        return b"".join(itertools.chain.from_iterable(parts))


def never() -> bool:
    """A `should_stop` for callers that wait as long as it takes."""
    return False
