"""The bytes of all requests together are bounded, from the first chunk of a body until the answer has been sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes import picture
from tests.integration.conftest import Live


def noise(size: int) -> bytes:
    """No image, as is known when it has been read whole."""
    return bytes(size)


def test_body_beyond_the_bound_is_refused_until_an_answer_makes_room(serve: Callable[..., Live]) -> None:
    live = serve(max_held_bytes=1000)
    first = live.hold_device()
    assert live.state.held_bytes.size == len(picture())
    refused = live.detect(noise(1000))
    assert (refused.status_code, refused.json()["code"]) == (429, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    assert live.metric('roiserve_rejected_total{reason="overloaded"}') == 1
    live.release_device()
    assert first.result().status_code == 200
    assert live.detect(picture()).status_code == 200


@pytest.mark.parametrize("content_type", ["image/png", "application/json", "multipart/form-data; boundary=b"])
def test_body_of_unknown_length_is_refused_as_it_grows(serve: Callable[..., Live], content_type: str) -> None:
    live = serve(max_held_bytes=1000)
    live.hold_device()
    head = (
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' if "form" in content_type else b""
    )
    chunks = (chunk for chunk in (head, *[b"x" * 100] * 10) if chunk)
    refused = live.client.post("/v1/detect", content=chunks, headers={"Content-Type": content_type})
    assert refused.status_code == 429
    live.release_device()


def test_nothing_is_held_when_all_is_answered(serve: Callable[..., Live]) -> None:
    live = serve(max_body_bytes=2000)
    statuses = [live.detect(body).status_code for body in (picture(), noise(1500), noise(3000))]
    assert statuses == [200, 415, 413]
    while live.state.held_bytes.size:
        assert live.client.get("/healthz").status_code == 200  # the last answer arrives a moment before it is entered
