"""What hosting platforms ask for: the answers of `/v1/detect`, for each instance."""

from __future__ import annotations

import base64
from collections.abc import Callable

import pytest

from tests.fakes import picture
from tests.integration.conftest import Live

PICTURE = picture(red=204)
TEXT = base64.b64encode(PICTURE).decode()


def test_each_instance_gets_what_detect_finds(live: Live) -> None:
    expected = live.detect(PICTURE, score_thresh=0.5).json()["detections"]
    instances = [TEXT, {"b64": TEXT}, {"image": TEXT}, {"image": {"b64": TEXT}}]
    document = {"instances": instances, "parameters": {"score_thresh": 0.5}}
    for path in ("/v1/models/fake:predict", "/v1/models/fake@1:predict", "/invocations"):
        answer = live.client.post(path, json=document).json()
        assert [one["detections"] for one in answer["predictions"]] == [expected] * 4
        assert answer["predictions"][0]["image"] == {"width": 64, "height": 48, "orientation_applied": False}


def test_model_is_chosen_by_path_or_parameter(live: Live) -> None:
    document = {"instances": [TEXT], "parameters": {"model": "fake-boxes"}}
    [found] = live.client.post("/invocations", json=document).json()["predictions"]
    [same] = live.client.post("/v1/models/fake-boxes:predict", json={"instances": [TEXT]}).json()["predictions"]
    assert found["model"] == same["model"] == "fake-boxes"
    assert live.client.post("/v1/models/fake:predict", json=document).status_code == 422


@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "application/x-image"])
def test_image_alone_is_invoked(live: Live, content_type: str) -> None:
    response = live.client.post("/invocations", content=PICTURE, headers={"Content-Type": content_type})
    assert response.json()["detections"] == live.detect(PICTURE).json()["detections"]


def test_platforms_see_that_it_is_ready(live: Live) -> None:
    assert live.client.get("/ping").status_code == 200
    model = live.client.get("/v1/models/fake").json()
    assert (model["name"], model["ready"]) == ("fake", True)


def test_platforms_may_choose_the_paths(serve: Callable[..., Live]) -> None:
    own = serve(health_route="/my/health", predict_route="/my/model:predict", api_keys="k" * 32)
    assert own.client.get("/my/health").status_code == 200
    refused = own.client.post("/my/model:predict", json={"instances": [TEXT]})
    assert (refused.status_code, refused.json()["code"]) == (401, "missing_key")
    headers = {"X-API-Key": "k" * 32}
    answer = own.client.post("/my/model:predict", json={"instances": [TEXT]}, headers=headers).json()
    assert [one["label"] for one in answer["predictions"][0]["detections"]] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("document", "status", "words"),
    [
        ({}, 422, "option 'instances': field required"),
        ({"instances": []}, 422, "expected at least 1 items, got 0"),
        ({"instances": [TEXT, 1]}, 422, "instances[1]: expected an image in base64"),
        ({"instances": [TEXT, {"b64": TEXT, "x": 1}]}, 422, "instances[1]: expected an image in base64"),
        ({"instances": [{"b64": "http://a/b.jpg"}]}, 422, "instances[0]: 'image' is an address"),
        ({"instances": [TEXT], "parameters": {"x": 1}}, 422, "unknown option 'x'"),
        ({"instances": ["aGVsbG8gd29ybGQ="]}, 415, "not like an image"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/models/fake:predict", "/invocations"])
def test_wrong_document_is_refused_in_words(
    live: Live, path: str, document: dict[str, object], status: int, words: str
) -> None:
    response = live.client.post(path, json=document)
    assert (response.status_code, words in response.json()["error"]) == (status, True), response.text


def test_unknown_model_is_refused_in_the_form_of_the_protocol(live: Live) -> None:
    response = live.client.post("/v1/models/x:predict", json={"instances": [TEXT]})
    assert (response.status_code, response.json()["code"]) == (404, "model_not_found")
