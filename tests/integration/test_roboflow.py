"""Roboflow's own client, and `supervision`, get what `/v1/detect` finds; what the client never sends is refused."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FAKE_BOXES_INFO, FakePredictor, picture
from tests.integration.conftest import Live, running

CLIENT = Path(__file__).parents[2] / ".tools/roboflow/bin/python"
PICTURE = picture(red=204)
IMAGE = {"type": "base64", "value": base64.b64encode(PICTURE).decode()}
CAT = {"x": 16, "y": 24, "width": 32, "height": 48, "confidence": pytest.approx(0.8), "class": "cat", "class_id": 0}
DOG = {"x": 32, "y": 24, "width": 64, "height": 48, "confidence": pytest.approx(0.08), "class": "dog", "class_id": 1}


def without_masks(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [{name: one[name] for name in CAT} for one in answer["predictions"]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client got, see `roboflow_calls.py`."""
    if not CLIENT.exists():
        pytest.skip("inference-sdk is not installed: tests/install_tools.sh")
    path = tmp_path_factory.mktemp("roboflow") / "picture.png"
    path.write_bytes(PICTURE)
    with running(FakePredictor(), [FakePredictor(FAKE_BOXES_INFO)]) as live:
        live.wait_until_ready()
        program = Path(__file__).with_name("roboflow_calls.py")
        command = [str(CLIENT), str(program), f"{live.url}/roboflow", str(path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def test_client_finds_the_server_and_its_models(said: dict[str, Any]) -> None:
    assert said["server"] == "roiserve"
    kinds = {one["model_id"]: one["task_type"] for one in said["models"]}
    assert kinds["fake/1"] == kinds["fake"] == "instance-segmentation"
    assert kinds["fake-boxes/1"] == kinds["fake-boxes"] == "object-detection"


@pytest.mark.parametrize("call", ["boxes", "masks", "pillow", "async", "rle", "v0_async", "downsized"])
def test_client_gets_what_is_found_however_it_asks(said: dict[str, Any], call: str) -> None:
    assert said[call]["image"] == {"width": 64, "height": 48}
    assert without_masks(said[call]) == [CAT, DOG]


def test_client_sends_several_images(said: dict[str, Any]) -> None:
    assert [without_masks(one) for one in said["several"]] == [[CAT, DOG]] * 3
    assert [without_masks(one) for one in said["v0"]] == [[CAT, DOG]] * 2


def test_client_sets_options(said: dict[str, Any]) -> None:
    assert [one["class"] for one in said["confident"]] == ["cat"]
    assert [one["class"] for one in said["v0_confident"]] == ["cat"]
    assert [one["class"] for one in said["default"]] == ["cat", "dog"]
    assert [one["class"] for one in said["filtered"]["predictions"]] == ["dog"]
    assert said["v0_drawing"] == "/9j/"  # a JPEG in base64


def test_supervision_reads_boxes_and_masks(said: dict[str, Any]) -> None:
    expected = {
        "xyxy": [[0, 0, 32, 48], [0, 0, 64, 48]],
        "confidence": pytest.approx([0.8, 0.08]),
        "class_id": [0, 1],
        "class_name": ["cat", "dog"],
    }
    # What torchvision's pasting makes of a mask of ones: rows 1 to 47, columns 0 to 32 and 0 to 63.
    areas = [33 * 47, 64 * 47]
    with_masks = expected | {"areas": areas, "compact": ["CompactMask", areas]}
    assert said["detections"] == said["detections_of_rle"] == with_masks
    assert said["detections_of_boxes"] == expected | {"areas": None, "compact": None}


@pytest.mark.parametrize(
    ("case", "status", "words"),
    [
        ("no model", 404, "no model 'x@1' is loaded; loaded: fake-boxes@1, fake@1"),
        ("v0 no model", 404, "no model 'x@1' is loaded"),
        ("no image", 415, "the bytes look like text"),
        ("unknown label", 422, "fake@1 knows no label 'x'"),
        ("drawn", 422, "ask for a drawing by API v0 with format=image"),
        ("unload", 403, "no administrator's key is set"),
    ],
)
def test_client_gets_errors_in_words(said: dict[str, Any], case: str, status: int, words: str) -> None:
    got, message = said["errors"][case]
    assert (got, words in message) == (status, True), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": {"type": "url", "value": "http://a/b.jpg"}}, "of type 'url': expected 'base64'; addresses are not"),
        ({"image": {"type": "numpy", "value": "gASV"}}, "NumPy's pickles are not opened"),
        ({"image": []}, "expected at least 1 item"),
        ({"image": "iVBO"}, "option 'image'"),
        ({"confidence": 1.5}, "option 'confidence': input should be less than or equal to 1, got 1.5"),
        ({"iou_threshold": -1}, "option 'iou_threshold': input should be greater than or equal to 0, got -1"),
        ({"confidence": "high"}, "option 'confidence'"),
        ({"disable_preproc_auto_orient": True}, "EXIF orientation is always applied"),
        ({"treshold": 1}, "unknown option 'treshold'"),
        ({"model_id": None}, "option 'model_id'"),
    ],
)
def test_wrong_document_is_refused_in_words(live: Live, change: dict[str, object], words: str) -> None:
    document = {"model_id": "fake/1", "image": IMAGE, **change}
    response = live.client.post("/roboflow/infer/object_detection", json=document)
    assert (response.status_code, words in response.json()["message"]) == (422, True), response.text


def test_image_may_be_the_body_as_it_is_or_in_base64(live: Live) -> None:
    for content in (PICTURE, base64.b64encode(PICTURE), base64.encodebytes(PICTURE)):
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        answer = live.client.post("/roboflow/fake/1", content=content, headers=headers, params={"confidence": "40"})
        assert without_masks(answer.json()) == [CAT], answer.text
    for option in ("confidence", "overlap"):
        for value, words in (("101", "less than or equal to 100"), ("nan", "a finite number")):
            refused = live.client.post("/roboflow/fake/1", content=PICTURE, params={option: value})
            message = refused.json()["message"]
            expected = (422, True, True)
            assert (
                refused.status_code,
                f"option '{option}': " in message,
                f"{words}, got '{value}'" in message,
            ) == expected
    refused = live.client.post("/roboflow/fake/1", params={"image": "http://a/b.jpg"})
    assert (refused.status_code, "addresses are not fetched" in refused.json()["message"]) == (422, True)


def test_model_without_masks_has_none_to_give(live: Live) -> None:
    document = {"model_id": "fake-boxes", "image": IMAGE}
    response = live.client.post("/roboflow/infer/instance_segmentation", json=document)
    assert (response.status_code, "needs a model with masks" in response.json()["message"]) == (422, True)
    document["model_id"] = "fake"
    [cat, _] = live.client.post("/roboflow/infer/object_detection", json=document).json()["predictions"]
    assert cat.keys() == CAT.keys()


def test_key_may_be_in_the_query_where_the_client_puts_it(serve: Callable[..., Live]) -> None:
    own = serve(api_keys="k" * 32, admin_keys="a" * 32)
    for path, key, status in (
        ("/roboflow/model/registry?api_key=None", {}, 403),
        ("/roboflow/model/registry", {}, 401),
        (f"/roboflow/model/registry?api_key={'k' * 32}", {}, 200),
        ("/roboflow/model/registry", {"Authorization": f"Bearer {'k' * 32}"}, 200),
        ("/roboflow/model/registry?api_key=%E2%82%AC", {}, 403),
    ):
        assert own.client.get(path, headers=key).status_code == status
    missing = own.client.post("/roboflow/infer/object_detection", json={"model_id": "fake", "image": IMAGE})
    assert (missing.status_code, "api_key_transport='header'" in missing.json()["message"]) == (401, True)
    add = "/roboflow/model/add?api_key="
    assert own.client.post(add + "k" * 32, json={"model_id": "fake/1"}).status_code == 200
    refused = own.client.post(add + "k" * 32, json={"model_id": "other"})
    assert (refused.status_code, "an administrator's key" in refused.json()["message"]) == (403, True)
    remove = own.client.post("/roboflow/model/remove", json={"model_id": "fake"}, headers={"X-API-Key": "a" * 32})
    assert (remove.status_code, remove.json()["code"]) == (409, "model_needed")
