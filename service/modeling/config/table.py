"""`Table`, the base of all tables of `model.toml`, and the kinds of number that several tables share."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

Style = Literal["torchvision", "detectron2"]
Probability = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[int, Field(ge=1, le=8192)]
Channels = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=64)]
Scale = Annotated[float, Field(gt=0, le=1000)]


class Table(BaseModel):
    """A table of `model.toml`: unknown keys are errors, numbers must be finite, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def one_of(choices: object) -> str:
    """The values of a `Literal` in words."""
    return f"one of {', '.join(get_args(choices))}"
