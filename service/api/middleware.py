"""The outermost layer of every request: its id, its times, its log line, its metrics, and an answer whatever happens.
Pure ASGI: messages pass through it without being buffered.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.cors import CrossOrigin
from service.api.errors import error_response, path_of, report
from service.api.state import ApiState, Lifecycle, Phase
from service.batching.held_bytes import Holding
from service.errors import NotReadyError, OverloadedError, ServiceError
from service.logs import request_id_context
from service.metrics import exemplar_of
from service.structures import Progress
from service.tracing import Outcome, TraceParent, trace_id_of

if TYPE_CHECKING:
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

# A request id that a caller may choose: nothing that could break a log line or a header.
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# Requests for one image: refused before their bodies are read while there is no place for one.
_ONE_IMAGE_PATHS = ("/v1/detect", "/v1/annotate")
# The socket's buffers hold so much of a body, so it is here or on its way when the head arrives. Reading it costs next
# to nothing, and the connection can be kept open.
_SMALL_BODY_BYTES = 64 * 1024
# A piece of a long answer: writing it takes a millisecond or less.
_SLICE_BYTES = 256 * 1024
# How long we go on reading a body after an early answer: if the connection were closed at once, it would be reset, and
# a caller that is still sending would never see the answer.
_LINGER_SECONDS = 2.0
_CLIENT_CLOSED_REQUEST = 499
# Limits for a log line.
_MAX_PATH_LENGTH = 200
_MAX_ADDRESS_LENGTH = 64
# Probes and scrapes come every few seconds. Why a probe fails is logged where it happens; why a scrape fails is not.
_PROBES = ("/healthz", "/readyz")


@dataclass(slots=True)
class RequestRecord:
    """What is known of a request; the routes add to it.

    Attributes:
        holding: the bytes of its body, accounted for until its answer has been sent.
        parent: the caller's span, if it sent one.
        span: the request's own, if spans are recorded.
        resources: what else it holds until its answer has been sent.
        notes: fields for the log line, such as the model.
        status: of the answer, once it has begun.
        batch_id: of the batch that contained its image.
        caller: the fingerprint of its API key, if keys are needed.
    """

    request_id: str
    holding: Holding
    parent: TraceParent | None = None
    span: Span | None = None
    progress: Progress = field(init=False)
    notes: dict[str, object] = field(default_factory=dict)
    status: int | None = None
    batch_id: str | None = None
    caller: str | None = None
    resources: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.progress = Progress("body", trace_id=self.trace_id)

    @property
    def trace_id(self) -> str | None:
        """The id of the trace that the request belongs to: its span's or its caller's."""
        if self.span is not None:
            return trace_id_of(self.span)
        return None if self.parent is None else self.parent.trace_id

    @property
    def seconds(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.progress.started_at


async def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.state.record
    return record


Record = Annotated[RequestRecord, Depends(_record)]


class RequestMiddleware:
    """See the module.

    Args:
        app: what answers the requests.
    """

    def __init__(self, app: ASGIApp, state: ApiState) -> None:
        self._app = app
        self._state = state
        self._cross_origin = CrossOrigin(state.settings.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI calls it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        parent = TraceParent.parse(headers.get("traceparent"))
        span = None if self._state.tracer is None else self._state.tracer.begin(parent)
        with self._state.held_bytes.hold() as holding:
            await self._serve(scope, receive, send, RequestRecord(_request_id(headers), holding, parent, span))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        scope.setdefault("state", {})["record"] = record
        # Routes match with or without it, so a proxy may strip it or not.
        scope["root_path"] = self._state.settings.root_path
        token = request_id_context.set(record.request_id)
        exchange = _Exchange(scope, receive, send, record, self._state.lifecycle, self._cross_origin)
        try:
            await self._answer(scope, exchange)
        finally:
            record.resources.close()
            self._tell(scope, record)
            request_id_context.reset(token)

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        """Let the app answer; if it fails, send an error answer instead."""
        task = asyncio.current_task()
        assert task is not None
        self._state.lifecycle.enter(task)
        try:
            if scope["method"] == "POST" and path_of(scope) in _ONE_IMAGE_PATHS:
                self._state.admission.require_place(seconds_left=self._state.settings.request_timeout_ms / 1000)
            preflight = self._cross_origin.preflight(scope["method"], Headers(scope=scope))
            await (preflight or self._app)(scope, exchange.receive, exchange.send)
            return
        except OverloadedError as refused:
            error: ServiceError = refused
            exchange.record.notes |= {"code": refused.code, "detail": str(refused)}
        except asyncio.CancelledError:
            if not self._state.lifecycle.gave_up:
                raise
            task.uncancel()
            error = NotReadyError("the service stopped before this request was done")
        except Exception as unexpected:
            error = ServiceError("an error of the service; its log has it under this request id")
            error.__cause__ = unexpected
        finally:
            self._state.lifecycle.leave(task)
        report(error, self._state.metrics)
        if exchange.record.status is None:
            await exchange.read_small_body()
            await error_response(error, scope)(scope, exchange.receive, exchange.send)

    def _tell(self, scope: Scope, record: RequestRecord) -> None:
        """Count the request and write its log line."""
        path = path_of(scope)
        route = path if path in _ONE_IMAGE_PATHS else getattr(scope.get("route"), "path", "unmatched")
        status = record.status or _CLIENT_CLOSED_REQUEST
        self._state.metrics.requests.labels(route, status).inc()
        trace_id = record.trace_id
        self._state.metrics.request_duration.labels(route).observe(record.seconds, exemplar_of(trace_id))
        if self._state.tracer is not None and record.span is not None:
            outcome = Outcome(scope["method"], path, route, status, record.request_id, record.notes, record.batch_id)
            self._state.tracer.end(record.span, record.progress, outcome)
        is_quiet = route in _PROBES or (route == "/metrics" and status < 400)
        logger.log(
            logging.DEBUG if is_quiet else logging.INFO,
            "request",
            extra={
                "fields": {
                    **({"client": scope["client"][0][:_MAX_ADDRESS_LENGTH]} if scope.get("client") else {}),
                    "method": scope["method"],
                    "path": path if len(path) <= _MAX_PATH_LENGTH else f"{path[:_MAX_PATH_LENGTH]}…",
                    "status": status,
                    **{
                        f"{stage}_ms": round(1000 * seconds, 1)
                        for stage, seconds in record.progress.stage_seconds.items()
                    },
                    "total_ms": round(1000 * record.seconds, 1),
                    **({} if trace_id is None else {"trace_id": trace_id}),
                    **record.notes,
                }
            },
        )


class _Exchange:
    """The messages of one request and its answer."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: RequestRecord,
        lifecycle: Lifecycle,
        cross_origin: CrossOrigin,
    ) -> None:
        headers = Headers(scope=scope)
        self._cross_origin_headers = cross_origin.headers(headers)
        self.record = record
        self._receive = receive
        self._send = send
        self._lifecycle = lifecycle
        length = headers.get("content-length", "0")
        self._body_is_open = length != "0" or "transfer-encoding" in headers
        self._body_is_small = length.isdecimal() and int(length) <= _SMALL_BODY_BYTES
        self._lingers = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_is_open = message["type"] == "http.request" and message.get("more_body", False)
        return message

    async def read_small_body(self) -> None:
        """Read and discard a body that is small, so that the connection need not be closed after the answer."""
        if self._body_is_small:
            await self._read_to_the_end()

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.record.status = message["status"]
            self._lingers = self._body_is_open
            message = {**message, "headers": [*message["headers"], *self._headers()]}
        elif self._lingers and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._read_to_the_end()
            message = {"type": "http.response.body"}
        await self._send_in_slices(message)

    async def _send_in_slices(self, message: Message) -> None:
        """Send a message, the body of a long answer piece by piece, so that others get their turns in between."""
        body = message.get("body", b"")
        starts = range(0, len(body), _SLICE_BYTES)
        for start in starts[:-1]:
            await self._send({**message, "body": body[start : start + _SLICE_BYTES], "more_body": True})
            await asyncio.sleep(0)
        await self._send({**message, "body": body[starts[-1] :]} if len(starts) > 1 else message)

    def _headers(self) -> Iterable[tuple[bytes, bytes]]:
        yield b"x-request-id", self.record.request_id.encode()
        seconds = self.record.progress.stage_seconds | {"total": self.record.seconds}
        timing = ", ".join(f"{stage};dur={1000 * value:.1f}" for stage, value in seconds.items())
        yield b"server-timing", timing.encode()
        yield b"x-content-type-options", b"nosniff"
        for name, value in self._cross_origin_headers.items():
            yield name.lower().encode(), value.encode()
        if self._lingers or self._lifecycle.phase is Phase.DRAINING:
            yield b"connection", b"close"

    async def _read_to_the_end(self) -> None:
        """Read and discard the rest of the body; give up after a while."""
        try:
            async with asyncio.timeout(_LINGER_SECONDS):
                while self._body_is_open:
                    await self.receive()
        except TimeoutError:
            pass


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
