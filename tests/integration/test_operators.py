"""What an operator sets: quotas of keys, and a port of its own for metrics and probes."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from tests.fakes import picture
from tests.integration.conftest import Live
from tests.integration.test_metrics_page import free_port


def detect(live: Live, key: str, content: bytes | None = None) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "image/png"}
    return live.client.post("/v1/detect", content=content or picture(), headers=headers)


def test_a_key_beyond_its_quota_is_told_when_to_come_back_and_others_are_served(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="one,two", max_images_per_minute=2)
    assert [detect(live, "one").status_code for _ in range(2)] == [200, 200]
    refused = detect(live, "one")
    assert (refused.status_code, refused.json()["code"]) == (429, "quota_exceeded")
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert detect(live, "two").status_code == 200
    assert live.metric('roiserve_rejected_total{reason="quota_exceeded"}') == 1


def test_pixels_count_as_they_were_sent(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="one", max_pixels_per_minute=10_000)
    assert detect(live, "one", picture(height=100, width=200)).status_code == 200
    assert detect(live, "one").json()["code"] == "quota_exceeded"


def test_every_image_of_a_batch_counts(serve: Callable[..., Live]) -> None:
    live = serve(api_keys="one", max_images_per_minute=3)
    files = [("image", (f"{index}.png", picture(), "image/png")) for index in range(4)]
    headers = {"Authorization": "Bearer one"}
    assert live.client.post("/v1/detect/batch", files=files, headers=headers).status_code == 200
    assert detect(live, "one").status_code == 429


def test_metrics_and_probes_move_to_their_own_port(serve: Callable[..., Live]) -> None:
    port = free_port()
    live = serve(wait=False, admin_port=port)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as inner:
        while inner.get("/readyz").status_code != 200:
            pass
        assert live.detect(picture()).status_code == 200
        assert 'roiserve_images_total{model="fake@1",outcome="ok"} 1.0' in inner.get("/metrics").text
        assert inner.post("/v1/detect", content=picture()).status_code == 404
        refused = inner.get("/metrics", headers={"X-Large": "x" * 70_000})  # bounded like the API
        assert (refused.status_code, refused.json()["code"]) == (431, "headers_too_large")
    assert [live.client.get(path).status_code for path in ("/metrics", "/healthz", "/readyz")] == [404] * 3
