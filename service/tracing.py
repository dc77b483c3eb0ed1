"""Tracing. Every request belongs to a trace, identified by the caller's W3C `traceparent`; the log and the metrics'
exemplars carry its id. With the extra `otel` and an endpoint, spans of each request and each batch go to a collector.

A request's spans are created when it ends, from times that every process records anyway: tracing costs the device
nothing, and costs nothing at all while it is off.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.errors import ServiceError
from service.structures import Progress

if TYPE_CHECKING:
    from opentelemetry.trace import Link, Span, SpanContext

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
# In the order in which a request passes through them; the gaps between them are message passing.
STAGES = ("body", "decode", "queue", "inference", "encode", "respond")
# Batches with unanswered requests. A batch is never completed if one of its callers went away.
_MAX_OPEN_BATCHES = 256


@dataclass(frozen=True, slots=True)
class TraceParent:
    """The caller's trace, as defined by https://www.w3.org/TR/trace-context/.

    Attributes:
        trace_id: 32 hexadecimal digits.
        span_id: of the caller's span, 16 digits.
        is_sampled: whether the caller records it.
    """

    trace_id: str
    span_id: str
    is_sampled: bool

    @classmethod
    def parse(cls, header: str | None) -> TraceParent | None:
        """Parse the header `traceparent`; None if it is missing or invalid, as the standard requires."""
        match = _TRACEPARENT.fullmatch((header or "").strip())
        if match is None or header is None or header.startswith("ff") or (header.startswith("00") and match[4]):
            return None
        if not int(match[1], 16) or not int(match[2], 16):
            return None
        return cls(match[1], match[2], bool(int(match[3], 16) & 1))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a request, for its span.

    Attributes:
        route: the pattern of the route.
        status: of the answer.
        notes: the other fields of the log line, such as the model and the error code.
        batch_id: the batch that the image was in; None if there was no batch, or the request had several images.
    """

    method: str
    path: str
    route: str
    status: int
    request_id: str
    notes: Mapping[str, object]
    batch_id: str | None = None


@dataclass(slots=True)
class _OpenBatch:
    begin_ns: int
    end_ns: int
    size: int
    model: str
    links: list[Link] = field(default_factory=list)


class Tracer:
    """Sends spans to a collector over OTLP/HTTP, in the background and in its own batches.

    Args:
        endpoint: the collector's, such as http://collector:4318/v1/traces.
        version: of the service.

    Raises:
        ServiceError: the extra `otel` is not installed.
    """

    def __init__(self, endpoint: str, *, version: str) -> None:
        # Imported here: an optional extra, and slow to import.
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise ServiceError(
                "otlp_endpoint needs the extra otel: pip install --constraint constraints.txt '.[otel]'"
            ) from None

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "roiserve", "service.version": version})
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("roiserve", version)
        self._batches: OrderedDict[str, _OpenBatch] = OrderedDict()

    def begin(self, parent: TraceParent | None) -> Span:
        """Start the span of a new request, in the caller's trace or in a new one."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span("request", context=_context(parent), kind=SpanKind.SERVER)

    def end(self, span: Span, progress: Progress, outcome: Outcome) -> None:
        """Finish a request's span and add one for each of its stages."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        span.update_name(f"{outcome.method} {outcome.route}")
        span.set_attributes(_attributes(outcome))
        if outcome.status >= 500:
            span.set_status(StatusCode.ERROR)
        inside = set_span_in_context(span)
        now_ns, now = time.time_ns(), time.monotonic()
        begin_ns = now_ns - round(1e9 * (now - progress.started_at))
        for stage in STAGES:
            if (seconds := progress.stage_seconds.get(stage)) is None:
                continue
            end_ns = begin_ns + round(1e9 * seconds)
            self._tracer.start_span(stage, context=inside, start_time=begin_ns).end(end_ns)
            if stage == "inference" and outcome.batch_id is not None:
                self._add_to_batch(outcome, begin_ns, end_ns, span.get_span_context())
            begin_ns = end_ns
        span.end(now_ns)

    def stop(self) -> None:
        """Send the remaining spans, for at most five seconds."""
        for batch_id in list(self._batches):
            self._end_batch(batch_id)
        self._provider.force_flush(5000)
        self._provider.shutdown()

    def _add_to_batch(self, outcome: Outcome, begin_ns: int, end_ns: int, request: SpanContext) -> None:
        """Link a request to its batch's span. A batch belongs to no request's trace; its links name its requests."""
        from opentelemetry.trace import Link

        assert outcome.batch_id is not None
        batch = self._batches.get(outcome.batch_id)
        if batch is None:
            size = outcome.notes.get("batch_size", 1)
            model = str(outcome.notes.get("model", ""))
            batch = _OpenBatch(begin_ns, end_ns, size if isinstance(size, int) else 1, model)
            self._batches[outcome.batch_id] = batch
        batch.begin_ns, batch.end_ns = min(batch.begin_ns, begin_ns), max(batch.end_ns, end_ns)
        batch.links.append(Link(request))
        if len(batch.links) >= batch.size:
            self._end_batch(outcome.batch_id)
        elif len(self._batches) > _MAX_OPEN_BATCHES:
            self._end_batch(next(iter(self._batches)))

    def _end_batch(self, batch_id: str) -> None:
        batch = self._batches.pop(batch_id)
        attributes: dict[str, str | int] = {"roiserve.model": batch.model, "roiserve.batch_size": batch.size}
        span = self._tracer.start_span(
            "batch", context=_context(None), links=batch.links, attributes=attributes, start_time=batch.begin_ns
        )
        span.end(batch.end_ns)


def trace_id_of(span: Span) -> str:
    """32 hexadecimal digits."""
    return f"{span.get_span_context().trace_id:032x}"


def _context(parent: TraceParent | None) -> Any:
    """An empty context, or one with the caller's span."""
    from opentelemetry.context import Context
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    if parent is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if parent.is_sampled else TraceFlags.DEFAULT)
    caller = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), is_remote=True, trace_flags=flags)
    return set_span_in_context(NonRecordingSpan(caller), Context())


def _attributes(outcome: Outcome) -> dict[str, str | int | float | bool]:
    """OpenTelemetry's stable HTTP attributes, and our own."""
    attributes: dict[str, str | int | float | bool] = {
        "http.request.method": outcome.method,
        "http.route": outcome.route,
        "http.response.status_code": outcome.status,
        "url.path": outcome.path,
        "url.scheme": "http",
        "roiserve.request_id": outcome.request_id,
    }
    if outcome.status >= 500:
        attributes["error.type"] = str(outcome.notes.get("code", outcome.status))
    for name, value in outcome.notes.items():
        if name != "detail" and isinstance(value, str | int | float | bool):
            attributes[f"roiserve.{name}"] = value
    return attributes
