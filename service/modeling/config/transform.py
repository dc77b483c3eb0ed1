"""`[transform]`: how pixels become the network's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from service.modeling.config.table import Pixels, Style, Table

ColourChannels = Literal["rgb", "grey", "rgba"]
NUM_CHANNELS: Mapping[ColourChannels, int] = {"rgb": 3, "grey": 1, "rgba": 4}
"""The number of channels that the network reads."""


class TransformConfig(Table):
    """How pixels become the network's input: scaled to 0..1, normalised, and resized so that the shorter side is
    `min_size` pixels unless the longer one would then exceed `max_size`.

    Attributes:
        style: `torchvision` normalises, then interpolates between the four nearest pixels, and rounds the new size
            down; `detectron2` resizes bytes as Pillow does, averaging over all pixels that a new one covers, to the
            nearest size, then normalises.
        size_divisible: a batch is padded to a multiple of this; detectron2 does not pad for C4, which is 1.
        channels: input of the first convolution: `rgb`; `grey`, the luminance 0.299 R + 0.587 G + 0.114 B rounded to a
            byte like Pillow; or `rgba`, whose alpha is always 1, because pictures are decoded onto a background.
        mean: of each channel; subtracted.
        std: of each channel; the difference is divided by it.
    """

    style: Style = "torchvision"
    min_size: Pixels = 800
    max_size: Pixels = 1333
    size_divisible: Annotated[int, Field(ge=1, le=256)] = 32
    channels: ColourChannels = "rgb"
    mean: tuple[Annotated[float, Field(ge=-1000, le=1000)], ...] = (0.485, 0.456, 0.406)
    std: tuple[Annotated[float, Field(ge=1e-6, le=1000)], ...] = (0.229, 0.224, 0.225)

    @model_validator(mode="after")
    def _min_is_not_above_max(self) -> Self:
        if self.min_size > self.max_size:
            raise ValueError(f"expected min_size <= max_size, got {self.min_size} > {self.max_size}")
        return self

    @model_validator(mode="after")
    def _every_channel_has_its_numbers(self) -> Self:
        count = NUM_CHANNELS[self.channels]
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) != count:
                raise ValueError(
                    f"expected {key} of {count} number(s), one for each channel of {self.channels!r}, "
                    f"got {list(numbers)}"
                )
        return self
