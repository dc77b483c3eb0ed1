"""`/docs` works without internet, and `/openapi.json` says how to call everything."""

from __future__ import annotations

import re
import shutil
import subprocess

import openapi_spec_validator
import pytest

from tests.integration.conftest import Live

OPTIONS = {"model", "score_thresh", "max_detections", "labels", "masks", "roi_op", "timeout_ms"}


def test_page_loads_everything_from_this_server(live: Live) -> None:
    page = live.client.get("/docs").text
    assert not re.findall(r"https?://", page)
    assets = re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(r"url: '([^']+)'", page)
    assert len(assets) == 4
    for asset in assets:
        response = live.client.get(asset)
        assert response.status_code == 200
        assert len(response.content) > 1000
    assert live.client.get("/docs/no-such-file").status_code == 404


def test_browser_without_internet_shows_the_routes(live: Live) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-proxy-server", "--virtual-time-budget=20000", offline]
    run = subprocess.run([browser, *flags, "--dump-dom", f"{live.url}/docs"], capture_output=True, text=True)
    for path in ("/v1/detect", "/v1/annotate", "/v1/models", "/readyz"):
        assert f'data-path="{path}"' in run.stdout


def test_openapi_document_is_valid(live: Live) -> None:
    openapi_spec_validator.validate(live.client.get("/openapi.json").json())


def test_every_option_is_documented_for_query_form_and_json(live: Live) -> None:
    operation = live.client.get("/openapi.json").json()["paths"]["/v1/detect"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == OPTIONS
    assert all(parameter["description"] for parameter in operation["parameters"])
    content = operation["requestBody"]["content"]
    for media_type in ("multipart/form-data", "application/json"):
        assert content[media_type]["schema"]["properties"].keys() == {"image", "proposals", *OPTIONS}
    assert {"application/octet-stream", "image/*"} < content.keys()


def test_errors_are_documented_as_the_problems_that_are_sent(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    responses = document["paths"]["/v1/detect"]["post"]["responses"]
    assert {"200", "401", "403", "404", "413", "415", "422", "429", "503", "504"} <= responses.keys()
    schema = {"$ref": "#/components/schemas/Problem"}
    assert responses["422"]["content"] == {"application/problem+json": {"schema": schema}}
    assert "HTTPValidationError" not in document["components"]["schemas"]
