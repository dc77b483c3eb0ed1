"""The outermost layer answers whatever happens, and says nothing of our insides."""

from __future__ import annotations

import logging

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.settings import Settings
from tests.fakes import FakePredictor


@pytest.fixture
def app() -> FastAPI:
    app = create_app(Settings(), predictors=[FakePredictor()])

    @app.get("/crash")
    async def crash() -> None:
        raise KeyError("a secret of ours")

    return app


async def get(app: FastAPI, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        return await client.get(path, headers={"X-Request-ID": "abc"})


async def test_unexpected_error_is_a_500_that_tells_the_log_everything_and_the_caller_nothing(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    response = await get(app, "/crash")
    assert response.status_code == 500
    assert response.json()["code"] == "internal_error"
    assert response.headers["X-Request-ID"] == "abc"
    assert "secret" not in response.text
    assert "a secret of ours" in caplog.text


async def test_one_line_a_request_and_probes_are_quiet_whatever_they_say(
    app: FastAPI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.api")
    for path in ("/healthz", "/readyz", "/nowhere"):
        await get(app, path)
    lines = [record.__dict__["fields"] for record in caplog.records if record.message == "request"]
    assert [(line["path"], line["status"], line["code"]) for line in lines] == [
        ("/nowhere", 404, "route_not_found"),
    ]
