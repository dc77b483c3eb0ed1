"""`model.toml`: the description of a stored model: a `ModelConfig` (how to rebuild the network), `[weights]` (which
file, and its hash), `[int8]` (of a quantised version) and `[provenance]` (where it came from). Reading reports all
problems in one error.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from service.errors import ModelStoreError
from service.model_store.files import read_text
from service.model_store.quantizers import QUANTIZERS_FILE, Part
from service.model_store.toml_writer import write_toml
from service.modeling.config import ModelConfig

MODEL_TOML = "model.toml"
WEIGHTS_FILE = "weights.safetensors"

# Per file: enough to fix it, without megabytes of message for a hundred thousand wrong labels.
_LISTED_PROBLEMS = 20
# Far more than any model needs. Python takes a second to parse a megabyte, and far longer for a key of many parts.
_MAX_LENGTH = 1024 * 1024
_MAX_DOTS = 1000

Dtype = Literal["float32", "float16", "bfloat16"]
Figure = int | float


class WeightsTable(BaseModel):
    """`[weights]`: the file beside `model.toml` that holds the weights.

    Attributes:
        file: a file name, without folders.
        sha256: hash of the whole file, lower-case hexadecimal.
        dtype: how floating-point weights are stored; the server's `precision` determines how they are computed.
        source: where they came from (a URL, a file name).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$")] = WEIGHTS_FILE
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    dtype: Dtype = "float32"
    source: str | None = None


class Int8Tolerances(BaseModel):
    """`[int8.tolerances]`: the root mean square differences from float32 that pass when the model is loaded: boxes in
    pixels, scores and masks as probabilities.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    boxes: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    scores: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    masks: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Int8Table(BaseModel):
    """`[int8]`: what a version written by `roiserve quantize` is, and what that costs.

    Attributes:
        file: the file beside `model.toml` that says what runs in int8.
        sha256: hash of that file, lower-case hexadecimal.
        parts: the parts that run in int8, as a whole or mostly.
        kept_float: layers of these parts that stay in float32, because in int8 they cost too much precision.
        pictures: how many pictures the ranges were taken from.
        pictures_sha256: hash of the hashes of these pictures' files, in order.
        nncf: the version of NNCF that chose the ranges.
        tolerances: see there.
        ap: average precision of `boxes` and `masks`, 0 to 1, by the precision that it was measured in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.json$")] = QUANTIZERS_FILE
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    parts: tuple[Part, ...]
    kept_float: tuple[str, ...] = ()
    pictures: Annotated[int, Field(ge=1)]
    pictures_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    nncf: str
    tolerances: Int8Tolerances
    ap: dict[str, dict[str, float]] = {}


class ProvenanceTable(BaseModel):
    """`[provenance]`: where the model came from and under which terms it may be used. All optional.

    Attributes:
        data: what it was trained on.
        licence: of the weights.
        attribution: who must be credited when the model is used.
        command: the command line that made it.
        created: when.
        software: versions, such as `torch = "2.14.1"`.
        metrics: figures, or tables of figures: `AP50 = 0.91`, `box = {AP = 0.6}`.
        notes: anything else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str | None = None
    licence: str | None = None
    attribution: str | None = None
    command: str | None = None
    created: datetime | date | None = None
    software: dict[str, str] = {}
    metrics: dict[str, Figure | dict[str, Figure]] = {}
    notes: str | None = None


class ModelToml(ModelConfig):
    """A stored model's complete `model.toml`; usable wherever a `ModelConfig` is expected."""

    weights: WeightsTable
    int8: Int8Table | None = None
    provenance: ProvenanceTable = ProvenanceTable()


_Config = TypeVar("_Config", bound=ModelConfig)


def read_model_toml(path: Path) -> ModelToml:
    """Read and check a stored model's `model.toml`.

    Raises:
        ModelStoreError: not readable, not TOML, or not valid; names the file and every wrong key at once.
    """
    return validated(str(path), _read_document(path), ModelToml)


def read_network_tables(path: Path) -> dict[str, Any]:
    """The network's part of a `model.toml`, or of a fragment of one, as written; not yet validated.

    Raises:
        ModelStoreError: not readable, or not TOML.
    """
    document = _read_document(path)
    return {key: document[key] for key in document.keys() - {"weights", "int8", "provenance"}}


def read_model_config(path: Path) -> ModelConfig:
    """Read the network's part of a `model.toml`, with or without the tables of a stored model.

    Raises:
        ModelStoreError: as `read_model_toml`.
    """
    return validated(str(path), read_network_tables(path), ModelConfig)


def write_model_toml(
    path: Path,
    config: ModelConfig,
    weights: WeightsTable,
    provenance: ProvenanceTable,
    *,
    int8: Int8Table | None = None,
) -> None:
    """Write a stored model's `model.toml`, including defaults, so that the model is unaffected if a later release
    changes them. Tables that the network does not use are left out.
    """
    unused = {"proposals"} if config.has_rpn else {"anchors", "rpn"}
    unused |= set() if config.has_masks else {"masks"}
    document = config.model_dump(include=set(ModelConfig.model_fields) - unused)
    document |= {"weights": weights.model_dump()}
    if int8 is not None:
        document |= {"int8": int8.model_dump()}
    document |= {"provenance": provenance.model_dump()}
    path.write_text(write_toml(_without_empty_tables(document)), encoding="utf-8")


def _without_empty_tables(table: Mapping[str, object]) -> dict[str, object]:
    pruned = {key: _without_empty_tables(item) if isinstance(item, Mapping) else item for key, item in table.items()}
    return {key: item for key, item in pruned.items() if item is not None and item != {}}


def _read_document(path: Path) -> dict[str, Any]:
    text = read_text(path)
    if len(text) > _MAX_LENGTH or any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise ModelStoreError(
            f"{path}: expected at most {_MAX_LENGTH} characters, and {_MAX_DOTS} dots in a line, which parse at once"
        )
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, deeply nested lists, …
        raise ModelStoreError(f"{path}: not valid TOML: {error}") from error


def validated(source: str, document: Mapping[str, object], model: type[_Config]) -> _Config:
    """Validate a document.

    Args:
        source: where it came from, for the message.

    Raises:
        ModelStoreError: not valid; names every wrong key at once, up to `_LISTED_PROBLEMS`.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        found = error.errors()
        problems = [_describe(problem, model) for problem in found[:_LISTED_PROBLEMS]]
        if len(found) > _LISTED_PROBLEMS:
            problems.append(f"and {len(found) - _LISTED_PROBLEMS} more")
        raise ModelStoreError("\n  ".join([f"{source}: {_count(len(found), 'problem')}", *problems])) from error


def _describe(problem: ErrorDetails, model: type[BaseModel]) -> str:
    """One line: the key as in the file, what was expected, and the actual value."""
    *table, key = problem["loc"] or ("(whole file)",)
    place = ".".join(str(part) for part in (*table, key))
    if problem["type"] == "missing":
        return f"{place}: required, but missing"
    if problem["type"] == "extra_forbidden":
        return f"{place}: unknown key; {_known_keys(str(key), _fields_at(model, table))}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return f"{place}: {message}" if "got" in message else f"{place}: {message}; got {_shorten(repr(problem['input']))}"


def _known_keys(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"


def _fields_at(model: type[BaseModel], table: list[int | str]) -> list[str]:
    for name in table:
        annotation = model.model_fields[str(name)].annotation
        # `Table | None`: the table.
        field_type = next((one for one in get_args(annotation) if one is not NoneType), annotation)
        assert isinstance(field_type, type)
        assert issubclass(field_type, BaseModel)
        model = field_type
    return list(model.model_fields)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
