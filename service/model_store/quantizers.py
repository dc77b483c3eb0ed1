"""`int8.json`: which operations of a network's parts run in int8, and between which values their inputs lie. It names
operations of the graph that OpenVINO makes of a part; `service/inference/engines/int8.py` puts the quantisers in there.
Weights are not in it: `weights.py` stores those.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from service.errors import ModelStoreError
from service.model_store.files import read_text

QUANTIZERS_FILE = "int8.json"
Part = Literal["trunk", "box_head", "mask_head"]
PARTS: tuple[Part, ...] = get_args(Part)

Finite = Annotated[float, Field(allow_inf_nan=False)]
_STRICT = ConfigDict(extra="forbid", frozen=True)


class ActivationRange(BaseModel):
    """Values that are rounded to 256 levels between two numbers, by which 0 is met exactly.

    Attributes:
        after: the operation that computes them.
        into: the inputs that get them rounded, as `operation:index`; others get them as they are.
        low, high: the lowest and the highest level; values beyond become these. Numbers, or one for each channel.
    """

    model_config = _STRICT

    after: str
    into: tuple[str, ...]
    low: Finite | tuple[Finite, ...]
    high: Finite | tuple[Finite, ...]

    @model_validator(mode="after")
    def _check_order(self) -> ActivationRange:
        lows, highs = self.lows, self.highs
        if not lows or len(lows) != len(highs) or not all(low < high for low, high in zip(lows, highs, strict=True)):
            raise ValueError(f"expected low < high, got {self.low!s:.80} and {self.high!s:.80}")
        return self

    @property
    def lows(self) -> tuple[float, ...]:
        """One, or one for each channel."""
        return self.low if isinstance(self.low, tuple) else (self.low,)

    @property
    def highs(self) -> tuple[float, ...]:
        """As many as `lows`."""
        return self.high if isinstance(self.high, tuple) else (self.high,)


class Int8Layer(BaseModel):
    """A convolution or a matrix product in int8. Its weights are rounded to 255 levels, symmetric around 0, the
    outermost being the largest weight of each output channel.

    Attributes:
        operation: its name.
        weight: the key of its weights in the network's state; None if they are computed from others.
        bias_shift: added to its bias: what the rounding shifts its outputs by on average, with the opposite sign. A
            number for each output channel, or none at all.
    """

    model_config = _STRICT

    operation: str
    weight: str | None = None
    bias_shift: tuple[Finite, ...] = ()


class PartQuantizers(BaseModel):
    """What is in int8 in one part."""

    model_config = _STRICT

    layers: tuple[Int8Layer, ...] = ()
    activations: tuple[ActivationRange, ...] = ()


class Quantizers(BaseModel):
    """What is in int8 in a network, by part (`service/modeling/parts.py`). An empty part runs in float32."""

    model_config = _STRICT

    trunk: PartQuantizers = PartQuantizers()
    box_head: PartQuantizers = PartQuantizers()
    mask_head: PartQuantizers = PartQuantizers()

    def of(self, part: Part) -> PartQuantizers:
        """Those of one part."""
        found: PartQuantizers = getattr(self, part)
        return found

    @property
    def parts(self) -> tuple[Part, ...]:
        """Those with layers in int8."""
        return tuple(part for part in PARTS if self.of(part).layers)

    @property
    def weights(self) -> frozenset[str]:
        """The keys of the weights that are stored in int8."""
        return frozenset(layer.weight for part in PARTS for layer in self.of(part).layers if layer.weight is not None)

    @property
    def sha256(self) -> str:
        """Of the file, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def write_quantizers(path: Path, quantizers: Quantizers) -> None:
    """Write the file; its hash is `quantizers.sha256`."""
    path.write_text(quantizers.model_dump_json(), encoding="utf-8")


def read_quantizers(path: Path, sha256: str) -> Quantizers:
    """Read and check the file.

    Raises:
        ModelStoreError: missing, too large, changed since `sha256` was taken, or not what was expected.
    """
    text = read_text(path)
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != sha256:
        raise ModelStoreError(f"{path}: the file was changed: expected sha256 {sha256}, got {digest}")
    try:
        return Quantizers.model_validate_json(text)
    except ValidationError as error:
        [first, *_] = error.errors()
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise ModelStoreError(f"{path}: {place}: {first['msg']}") from error
