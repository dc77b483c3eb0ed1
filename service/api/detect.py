"""The routes that detect objects in one image or several, or draw them into the image. Reads the upload and its
options, hands jobs to the detector and writes the answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response

from service.api.ask import Ask, Order
from service.api.auth import require_key
from service.api.body import read_upload
from service.api.disconnect import while_connected
from service.api.errors import problem, report
from service.api.middleware import Record, RequestRecord
from service.api.openapi import PICTURE_SCHEMA, describe_answer, describe_errors, describe_upload
from service.api.options import (
    AnnotateParameters,
    AnswerParameters,
    DetectParameters,
    ResolvedOptions,
    coco_form,
    merge_options,
    read_proposals,
    refuse_repeated_options,
    resolve_options,
)
from service.api.schemas import BatchAnswer, DetectAnswer, detections_document, json_response, pieces_response
from service.api.state import ApiState, State
from service.errors import AnswerTooLargeError, CancelledRequestError, InvalidRequestError, ServiceError
from service.structures import Answer, Coco, Drawing, Encoded, Form, Json, ModelInfo, PictureType, Progress
from service.tasks import all_of

router = APIRouter(
    prefix="/v1",
    tags=["detect"],
    dependencies=[Depends(require_key), Depends(refuse_repeated_options)],
    responses=describe_errors(401, 403, 404, 408, 413, 415, 422, 429, 503, 504, 507),
)


P = TypeVar("P", bound=DetectParameters)


@dataclass(frozen=True, slots=True, eq=False)
class _Order(Generic[P]):
    """What a request asks for: which images, which model, which options, and until when."""

    ask: Ask
    images: Sequence[bytes]
    file_names: Sequence[str]
    parameters: P
    info: ModelInfo
    resolved: ResolvedOptions
    deadline: float

    async def run(self, image: bytes, form: Form, progress: Progress, *, is_bulk: bool = False) -> Answer:
        """Find the objects in one image; errors as in `Ask.run`."""
        order = Order(self.info, self.resolved.options, form, self.deadline)
        source = Encoded(image, self.parameters.intensity or "full")
        return await self.ask.run(order, source, progress, is_bulk=is_bulk)

    def describe(self, answer: Answer, progress: Progress) -> dict[str, object]:
        return detections_document(
            self.info, answer, progress, roi_op=self.resolved.options.roi_op, intensity=self.parameters.intensity
        )

    def only_image(self) -> bytes:
        if not self.images:
            raise InvalidRequestError("expected one image, as the field 'image', got none")
        if len(self.images) > 1:
            raise InvalidRequestError(
                f"expected one image, as the field 'image', got {len(self.images)}; /v1/detect/batch takes several"
            )
        return self.images[0]


async def _read_order(request: Request, state: ApiState, record: RequestRecord, query: P) -> _Order[P]:
    settings = state.settings
    state.lifecycle.require_serving()
    state.quotas.require(record.caller)
    try:
        upload = await read_upload(
            request,
            max_body_bytes=settings.max_body_bytes,
            timeout_seconds=settings.body_timeout_seconds,
            holding=record.holding,
        )
    except CancelledRequestError:
        state.metrics.cancelled.labels(record.progress.stage).inc()
        raise
    state.quotas.charge(record.caller, images=len(upload.images))
    parameters = merge_options(query, upload)
    ask = Ask(request, state, record)
    info, deadline = ask.choose_model(parameters), ask.deadline(parameters)
    resolved = resolve_options(parameters, info, read_proposals(upload))
    return _Order(ask, upload.images, upload.file_names, parameters, info, resolved, deadline)


@router.post(
    "/detect",
    responses=describe_answer(DetectAnswer),
    openapi_extra=describe_upload(AnswerParameters, "multipart", "json", "raw"),
)
async def detect(
    request: Request, state: State, record: Record, query: Annotated[AnswerParameters, Query()]
) -> Response:
    """Find the objects in one image: their boxes, labels, scores and, if the model has them, masks.

    The image is the raw body, the multipart field `image`, or base64 in the JSON field `image`. Options are query
    parameters, other fields of the form, or other fields of the JSON object; each may be given in one place only.
    Boxes of your own to classify and refine go into the form or the JSON as `proposals`. With `format=coco`, the answer
    is an array of COCO results, as pycocotools takes them.
    """
    order = await _read_order(request, state, record, query)
    image, form = order.only_image(), _form_of(order, 0)
    answer = await while_connected(request, order.run(image, form, record.progress))
    record.batch_id = answer.batch_id
    record.notes |= {"batch_size": answer.batch_size, "detections": answer.detections}
    if isinstance(form, Coco):
        return json_response(answer)
    return json_response({"request_id": record.request_id} | order.describe(answer, record.progress))


@router.post(
    "/detect/batch",
    responses=describe_answer(BatchAnswer),
    openapi_extra=describe_upload(AnswerParameters, "multipart", several=True),
)
async def detect_batch(
    request: Request, state: State, record: Record, query: Annotated[AnswerParameters, Query()]
) -> Response:
    """Find the objects in several images, each a multipart field `image`: an answer or an error for each, in order.

    All of them share the request's one deadline (`timeout_ms`). With `format=coco`, the answer is one array of COCO
    results for all images, and an error if one of them fails.
    """
    order = await _read_order(request, state, record, query)
    if order.resolved.options.proposals is not None:
        raise InvalidRequestError("'proposals' are boxes of one image; send each image to /v1/detect with its own")
    if not order.images:
        raise InvalidRequestError("expected multipart fields 'image', got none")
    if order.parameters.image_id is not None:
        raise InvalidRequestError("'image_id' is the id of one image; here the files' names give the ids")
    results = await while_connected(request, _answer_each(order))
    record.notes["images"] = len(results)
    if order.parameters.format == "coco":
        return pieces_response(_one_array([one for one in results if isinstance(one, Answer)]))
    return json_response({"request_id": record.request_id, "results": results})


def _form_of(order: _Order[AnswerParameters], index: int) -> Json | Coco:
    if order.parameters.format != "coco":
        return Json(order.resolved.mask_format)
    file_name = order.file_names[index] if order.file_names else None
    return coco_form(order.parameters, order.resolved.mask_format, file_name)


def _one_array(answers: Sequence[Answer]) -> list[bytes]:
    """The JSON array, in pieces, of all elements of the answers, which are arrays."""
    pieces: list[bytes] = []
    for answer in answers:
        if answer.detections:
            first, *others = answer.pieces
            pieces += [b"," if pieces else b"[", first[1:], *others]
            pieces[-1] = pieces[-1][:-1]
    return [*pieces, b"]"] if pieces else [b"[]"]


async def _answer_each(order: _Order[AnswerParameters]) -> list[dict[str, object] | Answer]:
    """A document for each image, in order. An unexpected error in one of them cancels all the others, and so does any
    error with `format=coco`, whose answers, arrays of results, have no place for it.
    """
    state, trace_id = order.ask.state, order.ask.record.trace_id
    max_bytes, size = state.settings.max_answer_bytes, 0
    forms = [_form_of(order, index) for index in range(len(order.images))]

    async def answer_one(index: int) -> dict[str, object] | Answer:
        nonlocal size
        progress = Progress("decode", trace_id=trace_id)
        try:
            answer = await order.run(order.images[index], forms[index], progress, is_bulk=True)
            if size + answer.num_bytes > max_bytes:
                raise AnswerTooLargeError(
                    f"the answers to this request's images would have more than {max_bytes} bytes in all; send fewer "
                    "images, or ask for masks=rle, masks=crop or masks=none"
                )
        except ServiceError as error:
            if isinstance(forms[index], Coco):
                error.args = (f"{order.file_names[index]}: {error}",)
                raise
            report(error, state.metrics)
            return {"error": problem(error)}
        size += answer.num_bytes
        return answer if isinstance(forms[index], Coco) else order.describe(answer, progress)

    # Two batches' worth at a time keep the device busy and leave room in the queue for others.
    return await all_of(answer_one, range(len(order.images)), at_a_time=2 * state.settings.max_batch_size)


@router.post(
    "/annotate",
    response_class=Response,
    responses={200: {"content": {"image/png": PICTURE_SCHEMA, "image/jpeg": PICTURE_SCHEMA}}},
    openapi_extra=describe_upload(AnnotateParameters, "multipart", "json", "raw"),
)
async def annotate(
    request: Request, state: State, record: Record, query: Annotated[AnnotateParameters, Query()]
) -> Response:
    """Find the objects in one image, as `/v1/detect` does, and answer the image with the objects drawn into it."""
    order = await _read_order(request, state, record, query)
    picture_type: PictureType = "image/png" if order.parameters.format == "png" else "image/jpeg"
    form = Drawing(picture_type, order.parameters.drawn_parts)
    answer = await while_connected(request, order.run(order.only_image(), form, record.progress))
    return Response(answer.encoded, media_type=picture_type)
