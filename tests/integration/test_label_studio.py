"""Label Studio's calls, as its server makes them, get the detections of `/v1/detect` as regions."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from tests.fakes import picture
from tests.integration.conftest import Live
from tests.unit.api.test_label_studio_images import Studio
from tests.unit.masks.test_brush import decoded

PICTURE = picture(red=204)
ADDRESS = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}"
LABELS = '<Label value="Cat"/><Label value="bird"/>'


def config(*tags: str, labels: str = LABELS, attributes: str = "") -> str:
    found = "".join(f'<{tag} name="my{tag}" toName="img" {attributes}>{labels}</{tag}>' for tag in tags)
    return f'<View><Image name="img" value="$photo"/>{found}</View>'


def predict(live: Live, *addresses: object, label_config: str, model: str = "fake", **fields: object) -> httpx.Response:
    """POST tasks as Label Studio 1.23 does."""
    tasks = [
        {"id": index, "project": 1, "data": {"photo": address}, "annotations": []}
        for index, address in enumerate(addresses)
    ]
    params = {"login": None, "password": None, "context": None}
    document = {"tasks": tasks, "project": "1.1764158400", "label_config": label_config, "params": params, **fields}
    return live.client.post(f"/label-studio/{model}/predict", json=document)


def regions(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    [prediction] = response.json()["results"]
    found: list[dict[str, Any]] = prediction["result"]
    return found


def test_rectangles_are_in_percent(live: Live) -> None:
    response = predict(live, ADDRESS, label_config=config("RectangleLabels"))
    [region] = regions(response)
    assert len(region.pop("id")) == 10
    assert region == {
        "type": "rectanglelabels",
        "from_name": "myRectangleLabels",
        "to_name": "img",
        "original_width": 64,
        "original_height": 48,
        "image_rotation": 0,
        "score": pytest.approx(0.8),
        "value": {"x": 0, "y": 0, "width": 50, "height": 100, "rotation": 0, "rectanglelabels": ["Cat"]},
    }
    [prediction] = response.json()["results"]
    assert (prediction["model_version"], prediction["score"]) == ("fake@1", pytest.approx(0.8))


def test_polygons_and_brushes_show_the_mask(live: Live) -> None:
    polygon, brush = regions(predict(live, ADDRESS, label_config=config("PolygonLabels", "BrushLabels")))
    detection = live.detect(PICTURE, masks="polygons", score_thresh=0.5).json()["detections"][0]
    corners = set(zip(detection["mask"][0][::2], detection["mask"][0][1::2], strict=True))
    assert polygon["value"].pop("polygonlabels") == ["Cat"]
    assert polygon["value"].pop("closed") is True
    points = [(x * 64 / 100, y * 48 / 100) for x, y in polygon["value"].pop("points")]
    assert len(points) >= 4
    assert {(round(x), round(y)) for x, y in points} <= corners
    assert polygon["value"] == {}
    assert (brush["type"], brush["value"]["format"], brush["value"]["brushlabels"]) == ("brushlabels", "rle", ["Cat"])
    pixels = decoded(brush["value"]["rle"], (48, 64))[:, :, 3]
    assert pixels[2:-2, 2:30].all()
    assert not pixels[:, 34:].any()


def test_model_without_masks_serves_rectangles_alone(live: Live) -> None:
    both = config("BrushLabels", "RectangleLabels")
    assert [one["type"] for one in regions(predict(live, ADDRESS, label_config=both, model="fake-boxes"))] == [
        "rectanglelabels"
    ]
    refused = predict(live, ADDRESS, label_config=config("BrushLabels"), model="fake-boxes")
    assert (refused.status_code, refused.json()["error"]) == (
        422,
        "fake-boxes@1 has no masks, so that the project needs a tag RectangleLabels",
    )


def test_tag_sets_its_threshold(live: Live) -> None:
    labels = '<Label value="cat"/><Label value="dog"/>'

    def found(attributes: str) -> list[str]:
        tags = config("RectangleLabels", labels=labels, attributes=attributes)
        return [one["value"]["rectanglelabels"][0] for one in regions(predict(live, ADDRESS, label_config=tags))]

    assert found("") == ["cat", "dog"]
    assert found('model_score_threshold="0.5"') == ["cat"]
    assert found('model_score_threshold="0.9"') == []


def test_labels_that_the_project_lacks_are_left_out_and_counted(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        response = predict(live, ADDRESS, ADDRESS, label_config=config("RectangleLabels"))
    assert [len(one["result"]) for one in response.json()["results"]] == [1, 1]
    fields = [record.fields for record in caplog.records if hasattr(record, "fields")]
    assert any(one.get("images") == 2 and one.get("without_label") == 2 for one in fields)


def test_task_without_an_image_gets_no_prediction_and_the_others_do(live: Live) -> None:
    addresses = [ADDRESS, "data:image/png;base64,aGVsbG8gd29ybGQ=", None, "/data/upload/1/a.png", ADDRESS]
    results = predict(live, *addresses, label_config=config("RectangleLabels")).json()["results"]
    assert [bool(one) for one in results] == [True, False, False, False, True]
    assert results[1:4] == [[], [], []]


@pytest.mark.parametrize(
    ("address", "status", "words"),
    [
        ("data:image/png;base64,aGVsbG8gd29ybGQ=", 415, "not like an image"),
        ("data:image/png,hello", 422, "not in base64"),
        (None, 422, "task 0: expected the address of an image as 'photo'"),
        (["a"], 422, "task 0: expected the address"),
        ("/data/upload/1/a.png", 422, "ROISERVE_LABEL_STUDIO_URL"),
        ("http://169.254.169.254/latest/meta-data", 422, "this server fetches no images"),
    ],
)
def test_if_no_task_gets_a_prediction_the_answer_says_why(live: Live, address: object, status: int, words: str) -> None:
    response = predict(live, address, label_config=config("RectangleLabels"))
    assert (response.status_code, words in response.json()["error"]) == (status, True), response.text


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "option 'tasks': field required"),
        ({"tasks": [{}], "label_config": "<View/>"}, "field required"),
        ({"tasks": [{"data": {}}], "label_config": "<View"}, "label_config is not XML"),
        ({"tasks": [{"data": {}}], "label_config": "<!DOCTYPE x><x/>"}, "document type declaration"),
        ({"tasks": [{"data": {}}], "label_config": config()}, "no tag that takes objects"),
        ({"tasks": [{"data": {}}], "label_config": config("RectangleLabels", labels="")}, "it has: none"),
        ({"tasks": [{"data": {}}] * 1001, "label_config": config("RectangleLabels")}, "at most 1000 items"),
        ([], "expected a JSON object"),
    ],
)
def test_wrong_document_is_refused_in_words(live: Live, document: object, words: str) -> None:
    response = live.client.post("/label-studio/fake/predict", json=document)
    assert (response.status_code, words in response.json()["error"]) == (422, True), response.text


def test_huge_documents_are_refused(live: Live) -> None:
    response = predict(live, ADDRESS, label_config=config("RectangleLabels"), extra="x" * 1_000_000)
    assert (response.status_code, response.json()["code"]) == (413, "too_large")
    many = {"tasks": [], "label_config": "", "extra": [0] * 400_000}
    assert live.client.post("/label-studio/fake/predict", json=many).json() == {"results": []}


def test_connecting_checks_the_project(live: Live) -> None:
    def set_up(schema: str, model: str = "fake") -> httpx.Response:
        document = {"project": "1.1764158400", "schema": schema, "hostname": "", "access_token": "t"}
        return live.client.post(f"/label-studio/{model}/setup", json={**document, "extra_params": None})

    assert set_up(config("BrushLabels")).json() == {"model_version": "fake@1"}
    refused = set_up(config("BrushLabels", labels='<Label value="bird"/>'))
    expected = "the project has none of the labels of fake@1; it has: bird; the model's are: cat, dog"
    assert (refused.status_code, refused.json()["error"]) == (422, expected)
    assert set_up("<View/>").status_code == 422
    unknown = set_up(config("BrushLabels"), model="x")
    assert (unknown.status_code, unknown.json()["error"]) == (
        404,
        "no model 'x' is loaded; loaded: fake-boxes@1, fake@1",
    )


def test_further_calls_of_label_studio_are_answered(live: Live) -> None:
    assert live.client.get("/label-studio/fake/health").json()["status"] == "UP"
    assert live.client.get("/label-studio/x/health").status_code == 404
    assert live.client.get("/label-studio/fake/versions").json() == {"versions": ["fake@1"]}
    event = {"action": "ANNOTATION_CREATED", "annotation": {"result": []}, "project": {"id": 1}}
    assert live.client.post("/label-studio/fake/webhook", json=event).json() == {"status": "ignored"}
    for path, document, status in (("webhook", {"action": "START_TRAINING"}, 422), ("train", {}, 404)):
        refused = live.client.post(f"/label-studio/fake/{path}", json=document)
        assert (refused.status_code, "roiserve train" in refused.json()["error"]) == (status, True)


def test_key_is_the_password_of_basic_authentication(serve: Callable[..., Live]) -> None:
    own = serve(api_keys="k" * 32)

    def status(**options: Any) -> int:
        return own.client.get("/label-studio/fake/health", **options).status_code

    assert status() == 401
    assert status(auth=("label-studio", "k" * 32)) == 200
    assert status(auth=("k" * 32, "x")) == 403
    assert status(auth=("", "")) == 401
    assert status(headers={"Authorization": "Basic !"}) == 401
    assert status(headers={"Authorization": f"Bearer {'k' * 32}"}) == 200


@pytest.fixture
def studio() -> Iterator[Studio]:
    with Studio.running() as server:
        yield server


def test_images_come_from_the_label_studio_of_the_settings(serve: Callable[..., Live], studio: Studio) -> None:
    studio.image = PICTURE
    own = serve(label_studio_url=studio.url, label_studio_api_key="abc", request_timeout_ms=600_000)
    [region] = regions(predict(own, "/data/upload/1/a.png", label_config=config("RectangleLabels")))
    assert region["value"]["rectanglelabels"] == ["Cat"]
    assert studio.asked == [("GET", "/data/upload/1/a.png", "Token abc")]
    many = [f"/data/upload/1/{index}.png" for index in range(20)]
    results = predict(own, *many, "http://127.0.0.1:1/data/a.png", label_config=config("RectangleLabels")).json()
    assert [len(one["result"]) for one in results["results"][:20]] == [1] * 20
    assert results["results"][20] == []
    assert {path for _, path, _ in studio.asked[1:]} == set(many)
    assert own.state.held_bytes.size == 0


def test_label_studio_that_does_not_answer_delays_nobody_else(serve: Callable[..., Live], studio: Studio) -> None:
    own = serve(label_studio_url=studio.url, request_timeout_ms=600_000)
    waiting = [own.in_background(predict, own, "/data/slow", label_config=config("RectangleLabels")) for _ in range(12)]
    while len(studio.asked) < 8:
        pass
    assert own.detect(PICTURE).status_code == 200
    assert [one["type"] for one in regions(predict(own, ADDRESS, label_config=config("BrushLabels")))]
    studio.may_go_on.set()
    assert {one.result().status_code for one in waiting} == {422}
