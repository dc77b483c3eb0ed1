"""`/docs` works without internet, and `/openapi.json` says how to call everything."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import openapi_spec_validator
import pytest
from playwright.sync_api import Browser, Page
from pydantic import BaseModel

from service.api.schemas import BatchAnswer, DetectAnswer, Health, ModelDescription, ModelList, Problem
from tests.fakes import FakePredictor, picture
from tests.integration.conftest import Live, running

OPTIONS = {
    "model",
    "score_thresh",
    "nms_thresh",
    "class_agnostic_nms",
    "max_detections",
    "labels",
    "masks",
    "roi_op",
    "extras",
    "intensity",
    "timeout_ms",
}


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


ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/detect": DetectAnswer,
    "/v1/detect/batch": BatchAnswer,
    "/v1/models": ModelList,
    "/v1/models/{name}": ModelDescription,
    "/v1/models/{name}/load": ModelDescription,
    "/readyz": Health,
}


def test_every_answer_has_an_example_of_its_shape(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    shown = set()
    for path, route in document["paths"].items():
        for operation in route.values():
            for status, response in operation["responses"].items():
                content = response.get("content", {})
                if "application/json" in content and path in ANSWERS:
                    ANSWERS[path].model_validate(content["application/json"]["example"], extra="forbid")
                    shown.add(path)
                if "application/problem+json" in content:
                    assert Problem.model_validate(content["application/problem+json"]["example"]).status == int(status)
    assert shown == ANSWERS.keys()


def test_security_is_described_where_keys_are_needed(live: Live, serve: Callable[..., Live]) -> None:
    assert "securit" not in json.dumps(live.client.get("/openapi.json").json())
    paths = serve(admin_keys="root").client.get("/openapi.json").json()["paths"]
    assert {path for path, route in paths.items() for one in route.values() if "security" in one} == {
        "/v1/models/{name}/load",
        "/v1/models/{name}/unload",
        "/v2/repository/models/{name}/load",
        "/v2/repository/models/{name}/unload",
    }
    paths = serve(api_keys="a").client.get("/openapi.json").json()["paths"]
    assert "security" in paths["/v1/detect"]["post"]


@pytest.fixture(scope="module")
def served() -> Iterator[dict[str, Live]]:
    """Services by the path under which each is published."""
    with running(FakePredictor()) as plain, running(FakePredictor(), root_path="/behind/a/proxy") as behind:
        for live in (plain, behind):
            live.wait_until_ready()
        yield {"": plain, "/behind/a/proxy": behind}


@pytest.fixture(scope="module")
def page(browser: Browser) -> Page:
    """A page of a real browser."""
    page = browser.new_page()
    page.set_default_timeout(30_000)
    return page


def execute(page: Page, url: str, route: str, file: Path | None, media_type: str | None = None) -> str:
    """Open a route of the page, choose a file, press Execute and nothing else; returns the status shown."""
    page.goto(f"{url}/docs")
    block = page.locator(f'.opblock-post:has([data-path="{route}"])')
    block.locator(".opblock-summary").click()
    if media_type:
        block.locator(".opblock-section-request-body select").select_option(media_type)
    if file:
        block.locator('input[type="file"]').set_input_files(file)
    block.locator("button.execute").click()
    return block.locator(".live-responses-table tbody .response-col_status").inner_text().split()[0]


@pytest.mark.parametrize(
    ("prefix", "route", "media_type"),
    [
        ("", "/v1/detect", None),
        ("/behind/a/proxy", "/v1/detect", None),
        ("", "/v1/detect", "application/octet-stream"),
        ("", "/v1/detect", "application/json"),
        ("", "/v1/detect/batch", None),
        ("", "/v1/annotate", None),
        ("", "/v1/annotate", "application/json"),
    ],
)
def test_try_it_out_works_with_what_the_page_fills_in(
    served: dict[str, Live], page: Page, tmp_path: Path, prefix: str, route: str, media_type: str | None
) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(picture(red=204))
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    chosen = None if media_type == "application/json" else file
    assert execute(page, f"{served[prefix].url}{prefix}", route, chosen, media_type) == "200"
    assert errors == []


def test_browser_without_internet_shows_the_routes(live: Live, page: Page) -> None:
    page.goto(f"{live.url}/docs")
    for path in ("/v1/detect", "/v1/annotate", "/v1/models", "/readyz"):
        page.locator(f'[data-path="{path}"]').first.wait_for()


def test_openapi_document_is_valid(live: Live) -> None:
    openapi_spec_validator.validate(live.client.get("/openapi.json").json())


def test_every_option_is_documented_for_query_and_json(live: Live) -> None:
    operation = live.client.get("/openapi.json").json()["paths"]["/v1/detect"]["post"]
    assert {parameter["name"] for parameter in operation["parameters"]} == {*OPTIONS, "format", "image_id"}
    assert all(parameter["description"] for parameter in operation["parameters"])
    content = operation["requestBody"]["content"]
    assert content["application/json"]["schema"]["properties"].keys() == {
        *("image", "proposals", "format", "image_id"),
        *OPTIONS,
    }
    # Once, or Swagger UI would send them twice.
    assert content["multipart/form-data"]["schema"]["properties"].keys() == {"image", "proposals"}
    labels = next(parameter for parameter in operation["parameters"] if parameter["name"] == "labels")
    assert '"maxItems": 1000' in json.dumps(labels)
    assert {"application/octet-stream", "image/*"} < content.keys()


def test_errors_are_documented_as_the_problems_that_are_sent(live: Live) -> None:
    document = live.client.get("/openapi.json").json()
    responses = document["paths"]["/v1/detect"]["post"]["responses"]
    assert {"200", "401", "403", "404", "413", "415", "422", "429", "503", "504"} <= responses.keys()
    schema = {"$ref": "#/components/schemas/Problem"}
    [(media_type, content)] = responses["422"]["content"].items()
    assert (media_type, content["schema"]) == ("application/problem+json", schema)
    assert "HTTPValidationError" not in document["components"]["schemas"]
