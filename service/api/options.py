"""The options of a detection: their names, ranges and help, read from the query, a form or JSON alike, and what they
mean for a model. An option may be given in one place only, so that no order of precedence is needed. An empty option
counts as absent, since forms send empty values for fields that were not filled in.
"""

from __future__ import annotations

import re
import reprlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

import orjson
from fastapi import Request
from pydantic import BaseModel, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from service.api.body import Upload
from service.api.errors import MAX_MISTAKES, and_more, describe_expectation, describe_option_errors
from service.errors import InvalidRequestError
from service.structures import (
    ALL_DRAWN_PARTS,
    ALL_EXTRAS,
    Box,
    Coco,
    DetectOptions,
    DrawnPart,
    ExtraName,
    Intensity,
    MaskFormat,
    ModelInfo,
)

MAX_PROPOSALS = 2000
MAX_LABELS = 1000
# For a query: each label, and every other option once.
_MAX_QUERY_OPTIONS = MAX_LABELS + 50


GivenOptions = Annotated[dict[str, Any], Field(max_length=100)]
"""Options in a document of another protocol, not yet checked; far more than there are."""


class DetectParameters(BaseModel):
    """The options of one request; None means the default of the model or of the server."""

    model: str | None = Field(
        None, max_length=200, description="Model to ask: name or name@version; unset takes the server's default."
    )
    score_thresh: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Keep detections that score above this; unset, the model's."
    )
    max_detections: int | None = Field(
        None, ge=1, le=1000, description="Keep at most so many, best first; unset, the model's."
    )
    # fail_fast: one error for the whole list, rather than one for each of perhaps a hundred thousand items.
    labels: Annotated[list[Annotated[str, Field(max_length=200)]], Field(fail_fast=True)] | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABELS,
        description="Keep only these labels; repeat the option for several, or put commas between them. Unset keeps "
        "all.",
    )
    masks: MaskFormat | None = Field(
        None,
        description="Form of the masks: rle (COCO), polygons, png (of the whole image, base64), crop (png of the mask "
        "alone and its origin) or none. Unset: rle if the model has masks, else none.",
    )
    nms_thresh: float | None = Field(
        None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Of two detections of a class that overlap by more, as IoU, keep the better; unset, the model's.",
    )
    class_agnostic_nms: bool | None = Field(
        None,
        description="Let a detection suppress those of other classes too (nms_thresh). Unset, as the model has it.",
    )
    roi_op: str | None = Field(
        None,
        max_length=200,
        description="RoI operator of the box and the mask branch for this request, such as roi_pool, if the server "
        "allows it (allow_roi_op_override). Unset, the model's.",
    )
    extras: str | None = Field(
        None,
        max_length=100,
        description="Further outputs of each detection: class_scores, the probability of every class, from the "
        "background (0) on, so that class_scores[label_id] is the score. Unset: none.",
        examples=["class_scores"],
    )
    intensity: Intensity | None = Field(
        None,
        description="What is white in 16-bit grey: 65535 (full), or the picture's own largest value (stretch), as "
        "12-bit cameras need it. Unset: full.",
    )
    timeout_ms: int | None = Field(
        None,
        ge=1,
        le=3_600_000,
        description="Give up when this many milliseconds have passed since the request came; at most the server's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_options(cls, given: object) -> object:
        if not isinstance(given, Mapping):
            return given
        unknown = [name for name in given if name not in cls.model_fields]
        if unknown:
            # The message may contain braces, so it must not itself be the template.
            words = [_unknown_words(name, cls) for name in unknown[:MAX_MISTAKES]]
            raise PydanticCustomError(
                "unknown_option", "{words}", {"words": "; ".join([*words, *and_more(len(unknown))])}
            )
        return {name: value for name, value in given.items() if value not in ("", [""])}

    @field_validator("extras")
    @classmethod
    def _refuse_unknown_extras(cls, given: str | None) -> str | None:
        return _checked_names("extras", given, ALL_EXTRAS)

    @property
    def extra_names(self) -> tuple[ExtraName, ...]:
        """The further outputs that are asked for."""
        asked = {name.strip() for name in (self.extras or "").split(",")}
        return tuple(name for name in ALL_EXTRAS if name in asked)

    @field_validator("score_thresh", "max_detections", "nms_thresh", "timeout_ms", mode="before")
    @classmethod
    def _refuse_underscores(cls, given: object) -> object:
        """Python reads 1_0 as ten; other languages do not."""
        return refuse_underscores(given)


def _checked_names(kind: str, given: str | None, known: Sequence[str]) -> str | None:
    """Some names with commas between them, as they were given; raises PydanticCustomError if one is not known."""
    unknown = [name for name in (given or "").split(",") if given and name.strip() not in known]
    if unknown:
        words = f"{reprlib.repr(unknown[0])} is not one of {', '.join(known)} (separate several with commas)"
        raise PydanticCustomError(kind, "{words}", {"words": words})
    return given


def refuse_underscores(given: object) -> object:
    """Validator for numbers that come as text."""
    if isinstance(given, str) and "_" in given:
        raise PydanticCustomError("number", "Input should be a number without underscores")
    return given


def _unknown_words(name: str, kind: type[BaseModel]) -> str:
    if name in BodyParameters.model_fields:
        return f"option {name!r} goes into the form or the JSON, not into the query"
    similar = get_close_matches(name[:100].lower(), kind.model_fields, n=1)
    hint = f"did you mean {similar[0]!r}?" if similar else f"there are: {', '.join(kind.model_fields)}"
    return f"unknown option {reprlib.repr(name)}; {hint}"


_ProposedBox = Annotated[list[FiniteFloat], Field(min_length=4, max_length=4, fail_fast=True)]


class BodyParameters(BaseModel):
    """The options that are too long for a query: fields of JSON, or fields of a form, with JSON as their value."""

    proposals: Annotated[list[_ProposedBox], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_PROPOSALS,
        description=f"At most {MAX_PROPOSALS} boxes [x1, y1, x2, y2] in pixels of the upright image, clipped to it: "
        "classify and refine these, as Fast R-CNN does, instead of the proposals of the model's own RPN.",
    )


class AnswerParameters(DetectParameters):
    """The options of a detection, and those of the answer's form."""

    format: Literal["json", "coco"] | None = Field(
        None, description="Form of the answer: json, or coco for a bare array of COCO results. Unset: json."
    )
    image_id: Annotated[int, Field(ge=0, le=2**53)] | Annotated[str, Field(max_length=200)] | None = Field(
        None,
        description="The image's id in COCO results; digits make a number. Unset, the number or else the name of the "
        "file of a form: 000139.jpg is 139, cat.jpg is cat.jpg.",
        examples=[139],
    )

    @field_validator("image_id")
    @classmethod
    def _number_of_digits(cls, given: int | str | None) -> int | str | None:
        return image_id_of(given) if isinstance(given, str) else given


def image_id_of(name: str) -> int | str:
    """The id of an image in COCO results: a number if the name, without its suffix, has digits only; else the name."""
    stem = name.rpartition(".")[0] or name
    return int(stem) if re.fullmatch("[0-9]{1,18}", stem) else name


class AnnotateParameters(DetectParameters):
    """The options of a detection, and those of the picture."""

    format: Literal["png", "jpeg"] = Field("png", description="Format of the answered picture: png or jpeg.")
    draw: str | None = Field(
        None,
        max_length=100,
        description=f"What to draw: any of {', '.join(ALL_DRAWN_PARTS)}, separated by commas. Unset draws all of them, "
        "but leaves out what would hide the picture in a crowd.",
        examples=["masks,labels"],
    )

    @field_validator("draw")
    @classmethod
    def _refuse_unknown_parts(cls, given: str | None) -> str | None:
        return _checked_names("draw", given, ALL_DRAWN_PARTS)

    @field_validator("extras")
    @classmethod
    def _refuse_extras(cls, given: str | None) -> str | None:
        if given:
            raise PydanticCustomError("extras", "Expected none: a picture has no place for them; ask /v1/detect")
        return given

    @property
    def drawn_parts(self) -> Sequence[DrawnPart] | None:
        """What to draw; None for a choice that suits the image."""
        asked = {part.strip() for part in (self.draw or "").split(",")}
        return tuple(part for part in ALL_DRAWN_PARTS if part in asked) or None


P = TypeVar("P", bound=DetectParameters)


async def refuse_repeated_options(request: Request) -> None:
    """A dependency: only `labels` may occur in a query more than once.

    Raises:
        InvalidRequestError: another option does, or there are more options than can be valid.
    """
    if request.scope["query_string"].count(b"&") >= _MAX_QUERY_OPTIONS:
        raise InvalidRequestError(f"the query has more than {_MAX_QUERY_OPTIONS} options")
    _single_values(request.query_params.multi_items())


def only_options(*names: str) -> Callable[[Request], Awaitable[None]]:
    """A dependency: a query holds these options and no others, each once."""

    async def refuse_others(request: Request) -> None:
        await refuse_repeated_options(request)
        if unknown := [name for name in request.query_params if name not in names]:
            known = ", ".join(names) or "none"
            raise InvalidRequestError(f"unknown option {reprlib.repr(unknown[0])}; there are: {known}")

    return refuse_others


def merge_options(query: P, upload: Upload) -> P:
    """The options of the query and of the body together, except those that only a body may hold.

    Raises:
        InvalidRequestError: one is unknown, of the wrong type, out of range, or given twice.
    """
    in_query = query.model_dump(exclude_unset=True)
    in_body = upload.json or _single_values(upload.form)
    in_body = {
        name: value
        for name, value in in_body.items()
        if name not in BodyParameters.model_fields and value not in ("", [""])
    }
    if twice := sorted(in_query.keys() & in_body.keys()):
        raise InvalidRequestError(f"option {reprlib.repr(twice[0])} is given twice: in the query and in the body")
    try:
        # Strict for JSON: there "0.5" is text and true is not a number.
        return type(query).model_validate(in_query | in_body, strict=bool(upload.json))
    except ValidationError as error:
        raise InvalidRequestError(describe_option_errors(error.errors())) from None


def read_proposals(upload: Upload) -> tuple[Box, ...] | None:
    """The boxes that the caller proposes in a body, to replace the RPN's; None if there are none.

    Raises:
        InvalidRequestError: too many, or one is not a valid box; says which.
    """
    given = upload.json.get("proposals")
    if text := dict(upload.form).get("proposals"):
        try:
            given = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"the form's field 'proposals' is not JSON: {error}") from None
    try:
        boxes = BodyParameters.model_validate({"proposals": given}, strict=True).proposals
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" for part in first["loc"][1:2])
        raise InvalidRequestError(f"proposals{where}: {_describe_proposal_error(first)}") from None
    for index, (x1, y1, x2, y2) in enumerate(boxes or ()):
        if not (x1 < x2 and y1 < y2):
            raise InvalidRequestError(
                f"proposals[{index}]: expected x1 < x2 and y1 < y2, got {reprlib.repr([x1, y1, x2, y2])}"
            )
    return None if boxes is None else tuple((x1, y1, x2, y2) for x1, y1, x2, y2 in boxes)


def _describe_proposal_error(error: ErrorDetails) -> str:
    if error["type"] in ("too_short", "too_long") and len(error["loc"]) == 2:
        return f"expected 4 numbers, got {len(error['input'])}"
    return f"{describe_expectation(error)}; expected [[x1, y1, x2, y2], ...] in pixels"


def _single_values(items: Sequence[tuple[str, str]]) -> dict[str, object]:
    values: dict[str, list[str]] = defaultdict(list)
    for name, value in items:
        values[name].append(value)
    for name, given in values.items():
        if name != "labels" and len(given) > 1:
            raise InvalidRequestError(
                f"option {reprlib.repr(name)} is given {len(given)} times; only 'labels' may be repeated"
            )
    return {name: given if name == "labels" else given[0] for name, given in values.items()}


@dataclass(frozen=True, slots=True)
class ResolvedOptions:
    """What a request's options mean for one model."""

    options: DetectOptions
    mask_format: MaskFormat


def coco_form(parameters: AnswerParameters, mask_format: MaskFormat, file_name: str | None) -> Coco:
    """The form of COCO results.

    Args:
        file_name: of the image, if it came as a file.

    Raises:
        InvalidRequestError: nothing says what the image is called, or masks are wanted in another form.
    """
    if mask_format not in ("rle", "none"):
        raise InvalidRequestError(f"format=coco writes masks as masks=rle, or none of them, got masks={mask_format}")
    if parameters.extras:
        raise InvalidRequestError("COCO results have no place for the option 'extras'; leave it or format=coco out")
    if parameters.image_id is not None:
        return Coco(parameters.image_id, mask_format == "rle")
    if not file_name:
        raise InvalidRequestError(
            "format=coco needs the image's id: send the option 'image_id', or a form with a file that has a name"
        )
    return Coco(image_id_of(file_name), mask_format == "rle")


def resolve_options(
    parameters: DetectParameters, info: ModelInfo, proposals: tuple[Box, ...] | None = None
) -> ResolvedOptions:
    """Resolve the options for this model.

    Raises:
        InvalidRequestError: the model does not know a label, has no masks, cannot take the RoI operator, or needs
            proposals and there are none.
    """
    mask_format: MaskFormat = parameters.masks or ("rle" if info.has_masks else "none")
    if mask_format != "none" and not info.has_masks:
        raise InvalidRequestError(
            f"masks={mask_format} needs a model with masks, {info.key} is a {info.architecture}; leave the option out"
        )
    if parameters.roi_op is not None and parameters.roi_op not in info.roi_ops:
        known = ", ".join(info.roi_ops) or f"only its own, {info.roi_op}, without this option"
        # The one operator of this kind that some networks lack.
        is_adaptive = parameters.roi_op == "roi_warp" and info.roi_ops
        why = ", as its sampling_ratio is 0, adaptive, and roi_warp needs a number of points" if is_adaptive else ""
        raise InvalidRequestError(
            f"{info.key} cannot take roi_op={reprlib.repr(parameters.roi_op)}{why}; it can take: {known}"
        )
    if info.needs_proposals and proposals is None:
        raise InvalidRequestError(
            f"{info.key} is a {info.architecture} that proposes no boxes itself; give it some as the option "
            "'proposals', [[x1, y1, x2, y2], ...] in pixels"
        )
    options = DetectOptions(
        score_thresh=parameters.score_thresh,
        max_detections=parameters.max_detections,
        label_ids=_label_ids(parameters.labels, info),
        with_masks=mask_format != "none",
        proposals=proposals,
        roi_op=parameters.roi_op,
        nms_thresh=parameters.nms_thresh,
        class_agnostic_nms=parameters.class_agnostic_nms,
        extras=parameters.extra_names,
    )
    return ResolvedOptions(options, mask_format)


def _label_ids(labels: Sequence[str] | None, info: ModelInfo) -> frozenset[int] | None:
    if labels is None:
        return None
    ids = {label: index for index, label in enumerate(info.labels, start=1)}
    if not any("," in label for label in ids):
        labels = [part.strip() for label in labels for part in label.split(",") if part.strip()]
    if unknown := next((label for label in labels if label not in ids), None):
        raise InvalidRequestError(f"{info.key} knows no label {_short(unknown)}; {_known_labels(unknown, ids)}")
    return frozenset(ids[label] for label in labels) or None


def _known_labels(unknown: str, known: Iterable[str]) -> str:
    folded = {label.casefold(): label for label in known}
    if similar := get_close_matches(unknown[:100].casefold(), folded, n=1):
        return f"did you mean {folded[similar[0]]!r}? It knows: {', '.join(known)}"
    return f"it knows: {', '.join(known)}"


def _short(text: str) -> str:
    return repr(text) if len(text) <= 50 else reprlib.repr(text)
