"""Requests are traced: a real exporter sends to a collector over OTLP/HTTP, in which the spans are read."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from service.errors import ServiceError
from service.tracing import Tracer
from tests.fakes import picture
from tests.integration.conftest import Live, running_workers

pytest.importorskip("opentelemetry.sdk", reason="the extra otel is not installed")

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps the spans that come, as dictionaries."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[dict[str, Any]] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for group in request.resource_spans:
                    collector.services |= {
                        one.value.string_value for one in group.resource.attributes if one.key == "service.name"
                    }
                    collector.spans += [as_dict(span) for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def named(self, name: str) -> list[dict[str, Any]]:
        return [span for span in self.spans if span["name"] == name]


def as_dict(span: Any) -> dict[str, Any]:
    values = {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}
    return {
        "name": span.name,
        "trace": span.trace_id.hex(),
        "id": span.span_id.hex(),
        "parent": span.parent_span_id.hex(),
        "begin": span.start_time_unix_nano,
        "end": span.end_time_unix_nano,
        "links": [link.span_id.hex() for link in span.links],
        **values,
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    thread.join()


def test_a_request_has_a_span_in_the_callers_trace_and_one_a_stage(collector: Collector) -> None:
    """Across the worker process, where the stages happen."""
    with running_workers(otlp_endpoint=collector.endpoint) as live:
        live.wait_until_ready()
        headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "Content-Type": "image/png"}
        assert live.client.post("/v1/detect", content=picture(), headers=headers).status_code == 200
    [request] = collector.named("POST /v1/detect")
    assert (request["trace"], request["parent"]) == (TRACE, CALLER)
    assert request["http.response.status_code"] == 200
    assert request["roiserve.model"] == "fake@1"
    assert collector.services == {"roiserve"}
    stages = [collector.named(stage)[0] for stage in ("decode", "queue", "inference", "encode")]
    assert {stage["parent"] for stage in stages} == {request["id"]}
    ends = [request["begin"], *(time for stage in stages for time in (stage["begin"], stage["end"])), request["end"]]
    assert ends == sorted(ends)


def test_a_batch_is_linked_to_the_requests_that_it_had(collector: Collector, serve: Callable[..., Live]) -> None:
    live = serve(otlp_endpoint=collector.endpoint, max_batch_size=2)
    first = live.hold_device()
    others = [live.in_background(live.detect, picture()) for _ in range(2)]
    live.wait_for_metric('roiserve_queue_depth{model="fake@1"}', 2)
    live.release_device()
    assert [one.result().json()["batch_size"] for one in (first, *others)] == [1, 2, 2]
    tracer = live.state.tracer
    assert tracer is not None
    tracer.stop()
    batches = sorted(collector.named("batch"), key=lambda batch: batch["roiserve.batch_size"])
    assert [len(batch["links"]) for batch in batches] == [1, 2]
    requests = {span["id"] for span in collector.named("POST /v1/detect")}
    assert {link for batch in batches for link in batch["links"]} == requests


def test_errors_are_marked(collector: Collector, serve: Callable[..., Live]) -> None:
    live = serve(otlp_endpoint=collector.endpoint)
    assert live.detect(picture(red=13)).status_code == 503
    assert live.state.tracer is not None
    live.state.tracer.stop()
    [request] = collector.named("POST /v1/detect")
    assert request["error.type"] == "inference_failed"


def test_trace_ids_reach_the_exemplars_also_without_a_collector(serve: Callable[..., Live]) -> None:
    live = serve()
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "Content-Type": "image/png"}
    live.client.post("/v1/detect", content=picture(), headers=headers)
    page = live.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert page.headers["content-type"].startswith("application/openmetrics-text")
    named = [line for line in page.text.splitlines() if f'# {{trace_id="{TRACE}"}}' in line]
    assert any(line.startswith("roiserve_request_duration_seconds_bucket") for line in named)
    stages = {found[1] for line in named if (found := re.search('stage="([a-z_]+)"', line))}
    assert stages == {"decode", "queue", "encode", "backbone", "roi_heads"}
    assert TRACE not in live.client.get("/metrics").text


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{CALLER}-01",
        f"00-{TRACE.upper()}-{CALLER}-01",
        f"00-{TRACE}-{CALLER}-01-more",
    ],
)
def test_what_is_no_traceparent_is_passed_over(header: str, live: Live) -> None:
    headers = {"traceparent": header, "Content-Type": "image/png"}
    assert live.client.post("/v1/detect", content=picture(), headers=headers).status_code == 200


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ServiceError, match=r"needs the extra otel: pip install"):
        Tracer("http://127.0.0.1:4318/v1/traces", version="0")
