"""A long answer is sent in the pieces in which it arrived, and is the same JSON as a short one."""

from __future__ import annotations

import orjson
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from service.api.schemas import _LONG_BYTES, json_response
from service.structures import Answer


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("count", [0, 3, _LONG_BYTES // 40])
def test_the_detections_stand_in_their_place_whatever_their_length(count: int, encoding: str) -> None:
    found = [{"label": "nucleus", "score": 1 / (1 + number)} for number in range(count)]
    encoded = orjson.dumps(found)
    pieces = [encoded[start : start + 100_000] for start in range(0, len(encoded), 100_000)]
    document = {"model": "nuclei", "detections": Answer((48, 64), False, count, 1, pieces), "batch_size": 1}

    def answer(request: Request) -> Response:
        return json_response(document)

    app = Starlette(routes=[Route("/", answer)], middleware=[Middleware(GZipMiddleware, minimum_size=1024)])
    response = TestClient(app).get("/", headers={"Accept-Encoding": encoding})
    assert response.json() == {"model": "nuclei", "detections": found, "batch_size": 1}
    assert response.headers["content-type"] == "application/json"
    is_compressed = encoding == "gzip" and count > 3
    assert response.headers.get("content-encoding") == ("gzip" if is_compressed else None)
    if not is_compressed:
        assert int(response.headers["content-length"]) == len(response.content)
