"""The steps from a request's head to its answer that the routes of all protocols share: the body, the model, the
options, the deadline, and the jobs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated

from fastapi import Depends, Request
from pydantic import ValidationError

from service.api.body import read_data
from service.api.disconnect import while_connected
from service.api.errors import describe_option_errors
from service.api.middleware import Record, RequestRecord
from service.api.options import DetectParameters, resolve_options
from service.api.state import ApiState, State
from service.errors import AnswerTooLargeError, CancelledRequestError, InvalidRequestError
from service.structures import Answer, DetectOptions, Form, Job, ModelInfo, Progress, Source
from service.tasks import all_of

MAX_IMAGES = 1000
"""The most images in one request; each costs a little, however small it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Order:
    """What a request asks for each of its images.

    Attributes:
        deadline: in seconds of `time.monotonic`.
    """

    info: ModelInfo
    options: DetectOptions
    form: Form
    deadline: float


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """One request for detections, whatever its protocol."""

    request: Request
    state: ApiState
    record: RequestRecord

    def require_place(self) -> None:
        """Raise OverloadedError if one image would be refused now, before its body is read."""
        self.state.admission.require_place(seconds_left=self.state.settings.request_timeout_ms / 1000)

    async def read(self) -> bytes:
        """The request's body, decompressed if need be; errors as in `read_data`."""
        settings = self.state.settings
        try:
            return await read_data(
                self.request,
                max_body_bytes=settings.max_body_bytes,
                timeout_seconds=settings.body_timeout_seconds,
                holding=self.record.holding,
            )
        except CancelledRequestError:
            self.state.metrics.cancelled.labels(self.record.progress.stage).inc()
            raise

    def parameters(
        self, given: Mapping[str, object], *, names: Mapping[str, str] = MappingProxyType({})
    ) -> DetectParameters:
        """Options from their JSON form; the labels may also be one text with commas.

        Args:
            names: what the protocol calls an option, where that is not our name; for messages.

        Raises:
            InvalidRequestError: one is unknown, of the wrong type, or out of range.
        """
        labels = given.get("labels")
        try:
            return DetectParameters.model_validate(
                {**given, "labels": [labels]} if isinstance(labels, str) else given, strict=True
            )
        except ValidationError as error:
            raise InvalidRequestError(describe_option_errors(error.errors(), names=names)) from None

    def choose_model(self, parameters: DetectParameters) -> ModelInfo:
        """The requested model, kept from being unloaded until the request is answered.

        Raises:
            ModelNotFoundError: it is not loaded.
            InvalidRequestError: the request wants another RoI operator, which this server does not allow.
        """
        if parameters.roi_op is not None and not self.state.settings.allow_roi_op_override:
            raise InvalidRequestError(
                "option 'roi_op': this server keeps each model's operator; see allow_roi_op_override"
            )
        info = self.state.models.find(parameters.model)
        self.record.resources.enter_context(self.state.models.use(info))
        self.record.notes["model"] = info.key
        return info

    def deadline(self, parameters: DetectParameters) -> float:
        """When the caller stops waiting, in seconds of `time.monotonic`."""
        longest_ms = self.state.settings.request_timeout_ms
        return self.record.progress.started_at + min(parameters.timeout_ms or longest_ms, longest_ms) / 1000

    async def answer(
        self, sources: Sequence[Source], parameters: DetectParameters, form: Form
    ) -> list[tuple[Answer, Progress]]:
        """Find the objects in each image; if one image fails, the whole request fails.

        Args:
            parameters: the options; `masks` says whether masks are wanted.
            form: the form of the answers, masks included.

        Returns:
            For each image, in order, the answer and the times of its stages.

        Raises:
            ServiceError: the error of the first image that failed.
        """
        order = self.order(parameters, form, images=len(sources))
        answers = await while_connected(self.request, self._run_all(order, sources))
        if len(sources) == 1:
            [(answer, _)] = answers
            self.record.batch_id = answer.batch_id
            self.record.notes |= {"batch_size": answer.batch_size, "detections": answer.detections}
        else:
            self.record.notes["images"] = len(sources)
        return answers

    def order(self, parameters: DetectParameters, form: Form, *, images: int) -> Order:
        """Charge the caller for so many images, and choose the model and the options for them.

        Raises:
            ServiceError: too many images or none, over the quota, or an option or a model that cannot be had.
        """
        require_count(images)
        self.state.quotas.charge(self.record.caller, images=images)
        info = self.choose_model(parameters)
        return Order(info, resolve_options(parameters, info).options, form, self.deadline(parameters))

    async def run(self, order: Order, source: Source, progress: Progress, *, is_bulk: bool) -> Answer:
        """Find the objects in one image. Cancelling it drops the work that has not begun.

        Raises:
            ServiceError: see `Pipeline.run`.
        """
        job = Job(
            model=order.info.key,
            source=source,
            options=order.options,
            form=order.form,
            deadline=order.deadline,
            progress=progress,
            is_bulk=is_bulk,
        )
        answer = await self.state.admission.run(job)
        height, width = answer.image_size
        self.state.quotas.charge(self.record.caller, pixels=height * width)
        return answer

    async def _run_all(self, order: Order, sources: Sequence[Source]) -> list[tuple[Answer, Progress]]:
        is_bulk, size = len(sources) > 1, 0

        async def run_one(source: Source) -> tuple[Answer, Progress]:
            nonlocal size
            progress = Progress("decode", trace_id=self.record.trace_id) if is_bulk else self.record.progress
            answer = await self.run(order, source, progress, is_bulk=is_bulk)
            size += answer.num_bytes
            if size > self.state.settings.max_answer_bytes:
                raise AnswerTooLargeError(
                    f"the answer would have more than {self.state.settings.max_answer_bytes} bytes; send fewer images, "
                    "or ask for no masks"
                )
            return answer, progress

        # Two batches' worth at a time keep the device busy and leave room in the queue for others.
        return await all_of(run_one, sources, at_a_time=2 * self.state.settings.max_batch_size)


def require_count(images: int) -> None:
    """Raise InvalidRequestError if one request cannot have so many images."""
    if not 1 <= images <= MAX_IMAGES:
        raise InvalidRequestError(f"expected 1 to {MAX_IMAGES} images, got {images}")


async def _begin(request: Request, state: State, record: Record) -> Ask:
    state.lifecycle.require_serving()
    state.quotas.require(record.caller)
    return Ask(request, state, record)


Asked = Annotated[Ask, Depends(_begin)]
