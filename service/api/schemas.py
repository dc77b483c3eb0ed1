"""The JSON of answers: its schema for `/openapi.json`, and the functions that build it. The models here only document:
our own output is not validated at run time; a test checks that the two agree.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from types import MappingProxyType

import orjson
from fastapi import Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from service.structures import Answer, Intensity, MaskStyle, ModelInfo, Progress, Verification

# An answer of this size takes a millisecond to copy.
_LONG_BYTES = 1024 * 1024
_GROUP_BYTES = 64 * 1024
# Stands for an `Answer`: a byte that JSON never has.
_STAND_IN = b"\0"


class ImageFrame(BaseModel):
    """The image as the boxes see it."""

    width: int = Field(description="In pixels, after EXIF orientation.")
    height: int
    orientation_applied: bool = Field(description="Whether EXIF orientation turned or mirrored the stored pixels.")
    intensity: Intensity | None = Field(None, description="What the option `intensity` asked for; absent without it.")


class RunLengths(BaseModel):
    """A mask as COCO's compressed run lengths: what `pycocotools.mask.decode` takes."""

    size: tuple[int, int] = Field(description="Height and width of the image.")
    counts: str


class MaskCrop(BaseModel):
    """A mask cut to the smallest rectangle that holds it."""

    origin: tuple[int, int] = Field(description="x and y of the rectangle's first pixel in the image.")
    size: tuple[int, int] = Field(description="Height and width of the rectangle.")
    png: str = Field(description="Base64 of a PNG of 0 and 255.")


class Detection(BaseModel):
    """One object that was found."""

    box: tuple[float, float, float, float] = Field(description="x1, y1, x2, y2 in pixels of the image.")
    label: str
    label_id: int = Field(description="1-based; 0 is the background and never occurs.")
    score: float = Field(description="0 to 1.")
    mask: RunLengths | MaskCrop | list[list[float]] | str | None = Field(
        None, description="In the form that `masks` asked for: rle, crop, polygons or png. Absent without masks."
    )
    class_scores: list[float] | None = Field(
        None, description="The probability of every class, from the background (0) on. Absent unless asked for."
    )


class ImageDetections(BaseModel):
    """What one model found in one image."""

    model: str
    version: int
    roi_op: str = Field(description="The RoI operator that the model ran with.")
    image: ImageFrame
    detections: list[Detection] = Field(description="By falling score.")
    timings_ms: dict[str, float] = Field(description="decode, queue, inference, encode and total, in milliseconds.")
    batch_size: int = Field(description="How many images shared the batch.")


class DetectAnswer(ImageDetections):
    """The answer to one image."""

    request_id: str


class Problem(BaseModel):
    """An error, after RFC 9457."""

    type: str
    title: str
    status: int
    detail: str = Field(description="What was expected and what came.")
    code: str = Field(description="A stable word for programs.")
    request_id: str
    stage: str | None = Field(None, description="Where the request was when its deadline passed.")


class PlainProblem(BaseModel):
    """An error, for clients of other protocols."""

    error: str = Field(description="What was expected and what came.")
    code: str = Field(description="A stable word for programs.")
    request_id: str


class MessageProblem(BaseModel):
    """An error, for Roboflow's clients."""

    message: str = Field(description="What was expected and what came.")
    code: str = Field(description="A stable word for programs.")
    request_id: str


class ImageProblem(BaseModel):
    """Why one image of several has no answer."""

    error: Problem


class BatchAnswer(BaseModel):
    """An answer or an error for each image, in order."""

    request_id: str
    results: list[ImageDetections | ImageProblem]


class VerifiedDifference(BaseModel):
    """How far one kind of output is from that of the plain network."""

    difference: float = Field(
        description="The largest, in int8 the root mean square: boxes in pixels, scores and masks as probabilities."
    )
    tolerance: float = Field(description="The most that passes.")


class ModelVerification(BaseModel):
    """An engine's answers to two fixed pictures, compared with `eager` in float32 on the same device at load time."""

    passed: bool = Field(description="If not, another engine took the place of this one.")
    engine: str
    precision: str
    seconds: float
    boxes: VerifiedDifference
    scores: VerifiedDifference
    masks: VerifiedDifference | None = Field(None, description="Null for a model without masks.")
    recordings: VerifiedDifference | None = Field(
        None,
        description="The largest share of the detections that a recorded batch finds otherwise than the same work "
        "unrecorded. Null for engines other than graphs.",
    )


class ModelDescription(BaseModel):
    """A loaded model."""

    name: str
    version: int
    default: bool = Field(description="Whether requests that name no model go to this one.")
    ready: bool = Field(description="Always true: models are listed when they are loaded. KServe's clients look at it.")
    architecture: str
    backbone: str
    roi_op: str
    roi_ops: list[str] = Field(description="What the option roi_op may name, if the server allows it.")
    labels: list[str] = Field(description="The label at index i has the id i + 1.")
    score_thresh: float
    max_detections: int
    has_masks: bool
    mask_style: MaskStyle | None = Field(
        description="Whose paste_masks_in_image turns its small masks into pixels. Null for a model without masks."
    )
    engine: str
    precision: str
    device: str
    verification: ModelVerification | None = Field(
        None, description="Null for eager in float32, which is the reference for the others."
    )


class ModelList(BaseModel):
    """The loaded models."""

    models: list[ModelDescription]


class Health(BaseModel):
    """The state that a probe asks for."""

    status: str


def detections_document(
    info: ModelInfo,
    answer: Answer,
    progress: Progress,
    *,
    roi_op: str | None = None,
    intensity: Intensity | None = None,
) -> dict[str, object]:
    """What was found in one image, as `ImageDetections` describes it, for `json_pieces`.

    Args:
        roi_op: the operator that the request chose instead of the model's.
        intensity: the option of this name, as the request gave it.
    """
    height, width = answer.image_size
    seconds = {stage: progress.stage_seconds[stage] for stage in ("decode", "queue", "inference", "encode")}
    seconds["total"] = time.monotonic() - progress.started_at
    return {
        "model": info.name,
        "version": info.version,
        "roi_op": roi_op or info.roi_op,
        "image": {"width": width, "height": height, "orientation_applied": answer.orientation_applied}
        | ({} if intensity is None else {"intensity": intensity}),
        "detections": answer,
        "timings_ms": {stage: round(1000 * value, 3) for stage, value in seconds.items()},
        "batch_size": answer.batch_size,
    }


def model_document(info: ModelInfo, *, is_default: bool) -> dict[str, object]:
    """A loaded model, as `ModelDescription` describes it."""
    return {name: getattr(info, name) for name in ModelDescription.model_fields if name not in ("default", "ready")} | {
        "default": is_default,
        "ready": True,
        "mask_style": info.mask_style if info.has_masks else None,
        "verification": None if info.verification is None else verification_document(info.verification),
    }


def verification_document(verification: Verification) -> dict[str, object]:
    """The result of a verification, as `ModelVerification` describes it."""
    values = {name: verification.values.get(name) for name in ("boxes", "scores", "masks", "recordings")}
    return {
        "passed": verification.has_passed,
        "engine": verification.engine,
        "precision": verification.precision,
        "seconds": round(verification.seconds, 3),
    } | {name: value and asdict(value) for name, value in values.items()}


@dataclass(frozen=True, slots=True, eq=False)
class InPieces:
    """A part of a document that is JSON already."""

    pieces: Sequence[bytes]


def json_pieces(document: object) -> list[bytes]:
    """A document as JSON, serialized once, without validation. An `Answer` in it stands for its detections, which are
    JSON already, as what is `InPieces` is; they are not copied, hence the pieces.
    """
    answers: list[Answer | InPieces] = []

    def stand_in(value: object) -> orjson.Fragment:
        if not isinstance(value, Answer | InPieces):
            raise TypeError
        answers.append(value)
        return orjson.Fragment(_STAND_IN)

    encoded = orjson.dumps(document, default=stand_in, option=orjson.OPT_PASSTHROUGH_DATACLASS)
    first, *others = encoded.split(_STAND_IN)
    return [first, *chain.from_iterable((*one.pieces, text) for one, text in zip(answers, others, strict=True))]


def json_response(document: object) -> Response:
    """A JSON answer from a document; see `json_pieces`."""
    return pieces_response(json_pieces(document))


def pieces_response(
    pieces: Sequence[bytes], *, headers: Mapping[str, str] = MappingProxyType({}), media_type: str = "application/json"
) -> Response:
    """An answer from its bytes in pieces, which are not copied if they are long."""
    if (size := sum(map(len, pieces))) < _LONG_BYTES:
        return Response(b"".join(pieces), headers=headers, media_type=media_type)
    return _ResponseInPieces(pieces, headers={**headers, "content-length": str(size)}, media_type=media_type)


class _ResponseInPieces(Response):
    def __init__(self, pieces: Sequence[bytes], *, headers: Mapping[str, str], media_type: str) -> None:
        super().__init__(headers=headers, media_type=media_type)
        self._pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for piece in _grouped(self._pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


def _grouped(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """The pieces, small ones together, since sending each takes time."""
    group: list[bytes] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece)
        if size >= _GROUP_BYTES:
            yield b"".join(group)
            group, size = [], 0
    yield b"".join(group)
