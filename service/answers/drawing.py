"""Encodes the image with its detections drawn into it, as a picture file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from service.answers.encoder import Encoder
from service.imaging.overlay import draw_detections, encode_picture
from service.masks.paste import paste_mask
from service.structures import Detections, Drawing, Image, ModelInfo, PastedMask


class DrawingEncoder(Encoder):
    """See the module."""

    def __init__(self, form: Drawing) -> None:
        self._form = form

    def encode(
        self, image: Image, part: Detections, info: ModelInfo, *, should_stop: Callable[[], bool]
    ) -> Iterator[bytes]:
        """The picture's bytes."""

        def paste(index: int) -> PastedMask:
            assert part.masks is not None
            return paste_mask(part.masks[index], part.boxes[index], image.size, style=info.mask_style)

        drawn = draw_detections(
            image,
            part,
            info.labels,
            paste=None if part.masks is None else paste,
            parts=self._form.parts,
            should_stop=should_stop,
        )
        yield encode_picture(drawn, "png" if self._form.type == "image/png" else "jpeg")
