"""Label Studio's protocol for machine learning backends: connect a project to `http://host:8000/label-studio/nuclei`,
and its tasks get the model's detections as rectangles, polygons or brush strokes, whichever the project has tags for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field

from service.api.ask import Ask, Asked, Order
from service.api.auth import require_key
from service.api.disconnect import while_connected
from service.api.errors import RouteNotFoundError, detail_of, report
from service.api.health import ready
from service.api.json_body import decode_base64, parse_model
from service.api.label_studio_config import Control, read_controls
from service.api.models import Name
from service.api.openapi import describe_json, describe_plain_errors
from service.api.schemas import json_response
from service.api.state import State
from service.errors import AnswerTooLargeError, CancelledRequestError, InvalidRequestError, ServiceError, shown
from service.structures import Answer, Encoded, LabelStudio, LabelStudioTag, ModelInfo, Progress
from service.tasks import all_of

# Tasks may bring the brush strokes of their annotations: bytes as JSON numbers.
_MAX_VALUES = 1024 * 1024
_NO_TRAINING = "models are trained with `roiserve train`, not from Label Studio"


class SetupRequest(BaseModel):
    """What Label Studio says of a project when it connects."""

    schema_: str = Field(alias="schema", description="The labeling configuration, XML.")
    project: str | None = None


class Event(BaseModel):
    """A change in a project; further fields are ignored."""

    action: str | None = Field(None, examples=["ANNOTATION_CREATED"])


class Task(BaseModel):
    """One task; further fields are ignored."""

    id: Any = None
    data: dict[str, Any] = Field(
        description="Holds the image under the key that the configuration names: a path on the server that the setting "
        "`label_studio_url` names, or a `data:` URL.",
        examples=[{"image": "/data/upload/1/3c5a-photo.jpg"}],
    )


class PredictRequest(BaseModel):
    """Tasks of one project; further fields are ignored."""

    tasks: list[Task] = Field(max_length=1000)
    label_config: str = Field(
        description="XML.",
        examples=[
            '<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">'
            '<Label value="nucleus"/></RectangleLabels></View>'
        ],
    )


class Prediction(BaseModel):
    """What was found in one task's image."""

    model_version: str
    score: float | None = Field(description="The mean of the regions' scores, to sort tasks by.")
    result: list[dict[str, Any]] = Field(description="Regions, in Label Studio's own form.")


class PredictAnswer(BaseModel):
    """Of each task its prediction; an empty list where there is none, and Label Studio will ask again."""

    results: list[Prediction | list[Any]]


class SetupAnswer(BaseModel):
    """The model, as name@version."""

    model_version: str


router = APIRouter(
    prefix="/label-studio/{name}",
    tags=["label studio"],
    dependencies=[Depends(require_key)],
    responses=describe_plain_errors(401, 403, 404, 408, 413, 415, 422, 503),
)


@router.get("/health")
async def health(name: Name, state: State) -> Response:
    """Whether the model can be asked."""
    await ready(state)
    info = state.models.find(name)
    return json_response({"status": "UP", "model_class": info.key})


@router.get("/versions")
async def list_versions(name: Name, state: State) -> Response:
    """The loaded versions of the model."""
    state.lifecycle.require_serving()
    info = state.models.find(name)
    return json_response({"versions": [one.key for one in state.models if one.name == info.name]})


@router.post("/setup", response_model=SetupAnswer, openapi_extra=describe_json(SetupRequest))
async def set_up(name: Name, ask: Asked) -> Response:
    """Check that the project's configuration has a place for what the model finds."""
    info = ask.state.models.find(name)
    document = await asyncio.to_thread(parse_model, SetupRequest, await ask.read(), max_values=_MAX_VALUES)
    await asyncio.to_thread(_controls, document.schema_, info)
    return json_response({"model_version": info.key})


@router.post(
    "/predict",
    response_model=PredictAnswer,
    openapi_extra=describe_json(PredictRequest),
    responses=describe_plain_errors(429, 504, 507),
)
async def predict(name: Name, ask: Asked) -> Response:
    """Find the objects in the image of each task. A task whose image cannot be had, or for which no time was left, gets
    no prediction; if none gets one, the first one's error is the answer.
    """
    info = ask.state.models.find(name)
    document = await asyncio.to_thread(parse_model, PredictRequest, await ask.read(), max_values=_MAX_VALUES)
    if not document.tasks:
        return json_response({"results": []})
    controls = await asyncio.to_thread(_controls, document.label_config, info)
    form = LabelStudio(info.key, tuple(_tag(control, info) for control in controls))
    score_thresh = min(tag.score_thresh for tag in form.tags)
    options = {"masks": "rle" if form.with_masks else "none", "score_thresh": score_thresh}
    order = ask.order(ask.parameters({"model": info.key, **options}), form, images=len(document.tasks))
    predictions = _Predictions(ask, order, controls[0].data_key)
    return json_response({"results": await while_connected(ask.request, predictions.of(document.tasks))})


@router.post("/webhook", openapi_extra=describe_json(Event))
async def hear_event(name: Name, ask: Asked) -> Response:
    """Take note of a change in a project, of which Label Studio tells every backend; none matters here."""
    document = await asyncio.to_thread(parse_model, Event, await ask.read(), max_values=_MAX_VALUES)
    if document.action == "START_TRAINING":
        raise InvalidRequestError(_NO_TRAINING)
    return json_response({"status": "ignored"})


@router.post("/train")
async def train(name: Name) -> Response:
    """Training is not offered."""
    raise RouteNotFoundError(_NO_TRAINING)


def _controls(config: str, info: ModelInfo) -> list[Control]:
    """The tags of a project's configuration that take what the model detects, all for the same image.

    Raises:
        InvalidRequestError: there are none; or see `read_controls`.
    """
    controls = [one for one in read_controls(config) if info.has_masks or one.type == "rectanglelabels"]
    if not controls:
        raise InvalidRequestError(f"{info.key} has no masks, so that the project needs a tag RectangleLabels")
    fitting = [one for one in controls if one.match(info.labels)]
    if not fitting:
        theirs = ", ".join(label for one in controls for label in one.labels)
        raise InvalidRequestError(
            f"the project has none of the labels of {info.key}; it has: {theirs or 'none'}; the model's are: "
            f"{', '.join(info.labels)}"
        )
    return [one for one in fitting if one.to_name == fitting[0].to_name]


def _tag(control: Control, info: ModelInfo) -> LabelStudioTag:
    labels = control.match(info.labels)
    return LabelStudioTag(
        type=control.type,
        from_name=control.from_name,
        to_name=control.to_name,
        labels=tuple(labels.get(label) for label in info.labels),
        score_thresh=info.score_thresh if control.score_thresh is None else control.score_thresh,
    )


class _Predictions:
    """The predictions for the tasks of one request."""

    def __init__(self, ask: Ask, order: Order, data_key: str) -> None:
        self._ask = ask
        self._order = order
        self._data_key = data_key
        self._size = 0
        self._errors: list[ServiceError] = []
        self._without_label = 0

    async def of(self, tasks: Sequence[Task]) -> list[Answer | list[object]]:
        """A prediction for each task, or an empty list.

        Raises:
            ServiceError: no task has a prediction; the first one's error.
        """
        # Two batches' worth at a time keep the device busy and leave room in the queue for others.
        at_a_time = 2 * self._ask.state.settings.max_batch_size
        predict_one = partial(self._predict_or_note, is_bulk=len(tasks) > 1)
        results = await all_of(predict_one, tasks, at_a_time=at_a_time)
        if len(self._errors) == len(tasks):
            raise self._errors[0]
        notes: dict[str, object] = {"images": len(tasks)}
        if self._errors:
            notes |= {"failed": len(self._errors), "first_error": detail_of(self._errors[0])}
        if self._without_label:
            notes["without_label"] = self._without_label
        self._ask.record.notes |= notes
        return results

    async def _predict_or_note(self, task: Task, *, is_bulk: bool) -> Answer | list[object]:
        try:
            return await self._predict(task, is_bulk=is_bulk)
        except CancelledRequestError:
            raise
        except ServiceError as error:
            report(error, self._ask.state.metrics)
            self._errors.append(error)
            return []

    async def _predict(self, task: Task, *, is_bulk: bool) -> Answer:
        progress = Progress("fetch", trace_id=self._ask.record.trace_id) if is_bulk else self._ask.record.progress
        progress.enter("fetch")
        image, held_bytes = await self._fetch(task)
        try:
            answer = await self._ask.run(self._order, Encoded(image), progress, is_bulk=is_bulk)
        finally:
            self._ask.record.holding.release(held_bytes)
        self._without_label += answer.left_out
        self._size += answer.num_bytes
        if self._size > (max_bytes := self._ask.state.settings.max_answer_bytes):
            raise AnswerTooLargeError(
                f"the tasks' predictions would have more than {max_bytes} bytes; send fewer tasks, or use fewer tags"
            )
        return answer

    async def _fetch(self, task: Task) -> tuple[bytes, int]:
        """A task's image, and how many bytes are held for it beside the request's body."""
        address = task.data.get(self._data_key)
        if not isinstance(address, str):
            raise InvalidRequestError(
                f"task {shown(task.id)}: expected the address of an image as {self._data_key!r} of its data"
            )
        if address[:5].lower() == "data:":
            return await asyncio.to_thread(decode_base64, address.encode(errors="replace")), 0
        images = self._ask.state.label_studio_images
        if images is None:
            raise InvalidRequestError(
                f"this server fetches no images, got the address {address[:100]!r}; start it with "
                "ROISERVE_LABEL_STUDIO_URL, the address of your Label Studio, and ROISERVE_LABEL_STUDIO_API_KEY"
            )
        image = await images.fetch(address, deadline=self._order.deadline, holding=self._ask.record.holding)
        return image, len(image)
