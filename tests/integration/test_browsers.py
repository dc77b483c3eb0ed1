"""What pages of other origins may do, what answers tell browsers, and what stands at `/`."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable

import httpx
import pytest
from pydantic import ValidationError

from service.settings import Settings
from tests.fakes import picture
from tests.integration.conftest import Live

GOOD = picture(red=204)
PAGE = "https://app.example.com"
ASK = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key,content-type"}


def preflight(live: Live, origin: str) -> httpx.Response:
    return live.client.options("/v1/detect", headers={"Origin": origin, **ASK})


def test_other_origins_are_told_nothing_unless_they_are_named(live: Live) -> None:
    assert preflight(live, PAGE).status_code == 405
    response = live.client.post("/v1/detect", content=GOOD, headers={"Origin": PAGE})
    assert not [name for name in response.headers if name.startswith("access-control")]


@pytest.mark.parametrize(("setting", "allowed"), [(f"{PAGE},http://localhost:3000", PAGE), ("*", "*")])
def test_named_origins_may_call_and_read_answers_and_errors(
    serve: Callable[..., Live], setting: str, allowed: str
) -> None:
    live = serve(cors_origins=setting, api_keys="secret")
    asked = preflight(live, PAGE)
    assert asked.status_code == 204
    assert asked.headers["Access-Control-Allow-Origin"] == allowed
    assert "X-API-Key" in asked.headers["Access-Control-Allow-Headers"]
    assert "POST" in asked.headers["Access-Control-Allow-Methods"]
    good = live.client.post("/v1/detect", content=GOOD, headers={"Origin": PAGE, "X-API-Key": "secret"})
    refused = live.client.post("/v1/detect", content=GOOD, headers={"Origin": PAGE})
    assert (good.status_code, refused.status_code) == (200, 401)
    for response in (asked, good, refused):
        assert response.headers["Access-Control-Allow-Origin"] == allowed
        assert "X-Request-ID" in response.headers["Access-Control-Expose-Headers"]
        assert "access-control-allow-credentials" not in response.headers


def test_origin_that_is_not_named_is_not_allowed(serve: Callable[..., Live]) -> None:
    live = serve(cors_origins=PAGE)
    for origin in ("https://evil.example", "null", f"{PAGE}.evil.example"):
        assert "access-control-allow-origin" not in preflight(live, origin).headers
    assert preflight(live, "https://evil.example").headers["Vary"] == "Origin"


@pytest.mark.parametrize("origins", ["app.example.com", f"{PAGE}/", f"{PAGE}/x", "https://*.example.com"])
def test_what_is_no_origin_is_refused_at_the_start(origins: str) -> None:
    with pytest.raises(ValidationError, match="expected origins such as"):
        Settings(cors_origins=origins)  # type: ignore[arg-type]  # as in a variable


def test_start_page_is_a_page_for_browsers_and_json_for_others(live: Live) -> None:
    page = live.client.get("/", headers={"Accept": "text/html,*/*"})
    assert page.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["Content-Security-Policy"]
    assert "http-equiv" not in page.text
    document = live.client.get("/").json()
    assert document["docs"] == "/docs"
    for path in (document["docs"], document["models"], document["openapi"], document["ready"], document["metrics"]):
        assert live.client.get(path).status_code == 200


def test_answers_are_compressed_for_who_can_read_that(live: Live) -> None:
    kinds = {"Content-Type": "image/png"}
    boxes = [[0, 0, index + 1, 40] for index in range(40)]
    body = {"image": base64.b64encode(GOOD).decode(), "proposals": boxes}
    plain = live.client.post("/v1/detect", json=body, headers={"Accept-Encoding": "identity"})
    with live.client.stream("POST", "/v1/detect", json=body, headers={"Accept-Encoding": "gzip"}) as response:
        raw = b"".join(response.iter_raw())
    assert response.headers["Content-Encoding"] == "gzip"
    assert len(raw) < len(plain.content) / 2
    assert json.loads(gzip.decompress(raw))["detections"] == plain.json()["detections"]
    drawn = live.client.post("/v1/annotate", content=GOOD, headers={**kinds, "Accept-Encoding": "gzip"})
    assert "content-encoding" not in drawn.headers


def test_no_answer_is_taken_for_something_else(live: Live) -> None:
    for path in ("/", "/docs", "/v1/models", "/nowhere"):
        assert live.client.get(path).headers["X-Content-Type-Options"] == "nosniff"


def test_server_behind_a_prefix_is_found_with_and_without_it(serve: Callable[..., Live]) -> None:
    live = serve(root_path="/detector")
    for prefix in ("", "/detector"):
        assert live.client.get(f"{prefix}/v1/models").status_code == 200
        assert live.client.post(f"{prefix}/v1/detect", content=GOOD).status_code == 200
        assert live.client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": "/detector"}]
    assert live.client.get("/detectorx/v1/models").status_code == 404
    assert live.metric('roiserve_requests_total{route="/v1/detect",status="200"}') == 2


@pytest.mark.parametrize(("trusted", "client"), [("127.0.0.1", "203.0.113.7"), ("192.0.2.0/24", "127.0.0.1")])
def test_log_has_the_callers_address_as_a_trusted_proxy_tells_it(
    serve: Callable[..., Live], caplog: pytest.LogCaptureFixture, trusted: str, client: str
) -> None:
    live = serve(forwarded_allow_ips=trusted)
    lines: list[str] = []
    with caplog.at_level("INFO", "service.api.middleware"):
        live.client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.7"})
        while not lines:  # written after the answer
            lines = [record.__dict__["fields"]["client"] for record in caplog.records if record.message == "request"]
    assert lines == [client]
