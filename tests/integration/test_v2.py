"""The Open Inference Protocol: Triton's own client gets what `/v1/detect` finds, and errors that it can read; what the
client never sends is refused.
"""

from __future__ import annotations

import base64
import json
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FAKE_BOXES_INFO, FakePredictor, picture
from tests.integration.conftest import Live, running

CLIENT = Path(__file__).parents[2] / ".tools/tritonclient/bin/python"
PICTURE = picture(red=204)
IMAGE = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [base64.b64encode(PICTURE).decode()]}
UINT8 = {"name": "image", "shape": [1, 1, 3], "datatype": "UINT8", "data": [0, 1, 0]}
BOXES = [0, 0, 32, 48, 0, 0, 64, 48]
SCORES = [pytest.approx(0.8), pytest.approx(0.08)]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the client got, see `tritonclient_calls.py`."""
    if not CLIENT.exists():
        pytest.skip("tritonclient is not installed: tests/install_tools.sh")
    path = tmp_path_factory.mktemp("triton") / "picture.png"
    path.write_bytes(PICTURE)
    models = FakePredictor(), [FakePredictor(FAKE_BOXES_INFO)]
    with running(*models, admin_keys=("a" * 32,)) as live:
        live.wait_until_ready()
        program = Path(__file__).with_name("tritonclient_calls.py")
        command = [str(CLIENT), str(program), live.url.removeprefix("http://"), str(path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def test_client_finds_the_server_and_its_models(said: dict[str, Any]) -> None:
    assert (said["live"], said["ready"], said["model_ready"]) == (True, True, [True, True, False])
    assert "binary_tensor_data" in said["server"]["extensions"]
    assert said["model"]["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    outputs = {one["name"]: (one["datatype"], one["shape"]) for one in said["model"]["outputs"]}
    assert outputs["boxes"] == ("FP32", [-1, 4])
    assert outputs.keys() == {"boxes", "labels", "scores", "masks", "image_index", "class_scores"}
    assert said["config"]["parameters"] == {
        "labels": {"string_value": "cat,dog"},
        "mask_style": {"string_value": "torchvision"},
    }


@pytest.mark.parametrize("way", ["encoded", "gzip", "deflate"])
def test_client_gets_the_tensors_however_it_packs_them(said: dict[str, Any], way: str) -> None:
    assert said[way] == {
        "boxes": [[2, 4], "float32", BOXES],
        "labels": [[2], "int64", [1, 2]],
        "scores": [[2], "float32", SCORES],
        "masks": [[2, 28, 28], "float32", [1] * 8],
        "image_index": [[2], "int32", [0, 0]],
    }
    assert said["id"] == "my-1"


def test_client_sends_pixels_of_several_images(said: dict[str, Any]) -> None:
    assert said["pixels"]["scores"][2] == [*SCORES, pytest.approx(0.4)]
    assert said["pixels"]["image_index"][2] == [0, 0, 1]
    assert said["pixels_in_json"]["boxes"][2] == [0, 0, 4, 8, 0, 0, 8, 8]


def test_client_chooses_outputs_and_options(said: dict[str, Any]) -> None:
    assert said["chosen"].keys() == {"scores", "boxes"}
    assert said["options"]["scores"] == [[1], "float32", SCORES[:1]]
    assert said["without_masks"].keys() == {"boxes", "labels", "scores", "image_index"}


@pytest.mark.parametrize(
    ("case", "status", "words"),
    [
        ("model", "404", "no model 'x' is loaded"),
        ("image", "415", "image"),
        ("option", "422", "did you mean 'score_thresh'?"),
        ("output", "422", "no output 'boxs'"),
        ("key", "401", "send a key"),
        ("route", "404", "nothing at /v2/trace/setting"),
    ],
)
def test_client_can_read_every_error(said: dict[str, Any], case: str, status: str, words: str) -> None:
    got_status, message = said["errors"][case]
    assert (got_status, words in message) == (status, True), message


def test_client_reads_statistics_and_unloads(said: dict[str, Any]) -> None:
    [stats] = said["statistics"]["model_stats"]
    assert (stats["name"], stats["version"]) == ("fake", "1")
    # 8 requests of which one holds two images; of the refused ones, one image was none.
    assert stats["inference_count"] == stats["inference_stats"]["success"]["count"] >= 9
    assert stats["inference_stats"]["fail"]["count"] >= 1
    assert stats["inference_stats"]["success"]["ns"] >= stats["inference_stats"]["compute_infer"]["ns"] > 0
    assert [one["name"] for one in said["index"]] == ["fake", "fake-boxes"]
    assert said["index_after"] == [{"name": "fake", "version": "1", "state": "READY", "reason": ""}]


def infer(live: Live, document: object, **headers: str) -> tuple[int, str]:
    content = document if isinstance(document, bytes) else json.dumps(document).encode()
    response = live.client.post("/v2/models/fake/infer", content=content, headers=headers)
    assert response.headers["Content-Type"] == "application/json"
    return response.status_code, response.json().get("error", "")


def test_json_without_the_extension_is_answered_in_json(live: Live) -> None:
    answer = live.client.post("/v2/models/fake@1/infer", json={"id": "1", "inputs": [IMAGE]}).json()
    outputs = {one["name"]: one for one in answer["outputs"]}
    assert (answer["model_name"], answer["model_version"], answer["id"]) == ("fake", "1", "1")
    assert outputs["boxes"] == {"name": "boxes", "datatype": "FP32", "shape": [2, 4], "data": BOXES}


def test_body_after_a_head_of_no_bytes_is_one_image(live: Live) -> None:
    headers = {"Inference-Header-Content-Length": "0"}
    answer = live.client.post("/v2/models/fake/infer", content=PICTURE, headers=headers).json()
    assert [one["shape"] for one in answer["outputs"] if one["name"] == "scores"] == [[2]]


@pytest.mark.parametrize(
    ("document", "status", "words"),
    [
        (b"{", 422, "not JSON"),
        (b"[]", 422, "expected a JSON object"),
        ({"inputs": []}, 422, "got the inputs none"),
        ({"inputs": [IMAGE, IMAGE]}, 422, "got the inputs 'image', 'image'"),
        ({"inputs": [IMAGE | {"shape": [2]}]}, 422, "has the shape [2], but 1 elements"),
        ({"inputs": [IMAGE | {"shape": [-1]}]}, 422, "greater than or equal to 0"),
        ({"inputs": [IMAGE | {"shape": [0], "data": []}]}, 422, "expected 1 to 1000 images, got 0"),
        ({"inputs": [IMAGE | {"datatype": "FP32"}]}, 422, "got the datatype 'FP32'"),
        ({"inputs": [IMAGE | {"data": [1]}]}, 422, "expected texts"),
        ({"inputs": [IMAGE | {"data": ["http://a/b.jpg"]}]}, 422, "addresses are not fetched"),
        ({"inputs": [IMAGE | {"parameters": {"binary_data_size": 3}}]}, 422, "both"),
        ({"inputs": [IMAGE | {"data": None}]}, 422, "neither"),
        ({"inputs": [IMAGE | {"parameters": {"shared_memory_region": "a"}}]}, 422, "shared memory"),
        ({"inputs": [UINT8 | {"data": [0, 256, 0]}]}, 422, "0 to 255"),
        ({"inputs": [UINT8 | {"data": [0, 1.5, 0]}]}, 422, "0 to 255"),
        ({"inputs": [UINT8 | {"data": [[0], 1, 0]}]}, 422, "lengths"),
        ({"inputs": [UINT8 | {"shape": [1, 3]}]}, 422, "the shape [1, 3]"),
        (
            {"inputs": [UINT8 | {"data": ["a" * 100_000] + [0] * 100_000}]},
            422,
            "from 0 to 255, got 'aaaa",
        ),
        ({"inputs": [UINT8 | {"data": [[[[[0]]]]]}]}, 422, "from 0 to 255, got [0]"),
        ({"inputs": [UINT8 | {"data": [None, {}]}]}, 422, "from 0 to 255, got None"),
        ({"inputs": [UINT8 | {"shape": [1001, 1, 1, 3]}]}, 422, "expected 1 to 1000 images, got 1001"),
        ({"inputs": [IMAGE | {"shape": [1001], "data": [""] * 1001}]}, 422, "expected 1 to 1000 images, got 1001"),
        (
            {"inputs": [IMAGE | {"data": None, "parameters": {"binary_data_size": "9" * 5000}}]},
            422,
            "got '9999",
        ),
        ({"inputs": [IMAGE], "parameters": {"masks": "rle"}}, 422, "output 'masks'"),
        ({"inputs": [IMAGE], "parameters": {"timeout": "1"}}, 422, "microseconds"),
        ({"inputs": [IMAGE], "outputs": [{"name": "boxes"}, {"name": "boxes"}]}, 422, "asked for twice"),
        ({"inputs": [IMAGE | {"data": [0] * 300_000}]}, 413, "values"),
    ],
)
def test_wrong_document_is_refused_in_words(live: Live, document: object, status: int, words: str) -> None:
    got_status, error = infer(live, document)
    assert (got_status, words in error) == (status, True), error


@pytest.mark.parametrize("length", ["-1", "1e3", "999999", "x", "9" * 5000])
def test_wrong_length_of_the_head_is_refused(live: Live, length: str) -> None:
    status, error = infer(live, {"inputs": [IMAGE]}, **{"Inference-Header-Content-Length": length})
    assert (status, "Inference-Header-Content-Length" in error) == (422, True)


def test_tensor_of_empty_elements_is_read_no_further_than_its_shape(live: Live) -> None:
    head = json.dumps({"inputs": [IMAGE | {"data": None, "parameters": {"binary_data_size": 40_000}}]}).encode()
    status, error = infer(live, head + bytes(40_000), **{"Inference-Header-Content-Length": str(len(head))})
    assert (status, error) == (422, "the input 'image' has the shape [1], but 2 or more elements")


@pytest.mark.parametrize("binary", [b"\x05\0\0\0abc", b"\1\0", b"\xff\xff\xff\xff"])
def test_element_that_breaks_off_is_refused(live: Live, binary: bytes) -> None:
    head = json.dumps({"inputs": [IMAGE | {"data": None, "parameters": {"binary_data_size": len(binary)}}]}).encode()
    status, error = infer(live, head + binary, **{"Inference-Header-Content-Length": str(len(head))})
    assert (status, "break off" in error) == (422, True), error


def test_small_body_that_unpacks_to_a_huge_one_is_refused(live: Live) -> None:
    bomb = zlib.compress(b" " * 50_000_000)
    status, error = infer(live, bomb, **{"Content-Encoding": "deflate"})
    assert (status, "unpacked body has more than the 1000000 bytes" in error) == (413, True), error


@pytest.mark.parametrize(("body", "encoding", "status"), [(b"abc", "gzip", 422), (b"abc", "br", 415)])
def test_body_that_is_not_packed_as_it_says_is_refused(live: Live, body: bytes, encoding: str, status: int) -> None:
    assert infer(live, body, **{"Content-Encoding": encoding})[0] == status


@pytest.fixture(scope="module")
def guarded() -> Iterator[Live]:
    with running(FakePredictor(), api_keys=("u" * 32,), admin_keys=("a" * 32,)) as live:
        live.wait_until_ready()
        yield live


def test_keys_guard_models_but_not_probes(guarded: Live) -> None:
    client = guarded.client
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2/models/fake").status_code == 401
    users, admins = ({"Authorization": f"Bearer {letter * 32}"} for letter in "ua")
    assert client.get("/v2/models/fake", headers=users).status_code == 200
    response = client.post("/v2/repository/models/fake/unload", headers=users)
    assert (response.status_code, "administrator" in response.json()["error"]) == (403, True)
    response = client.post("/v2/repository/models/fake/unload", headers=admins)
    assert (response.status_code, response.json()["code"]) == (409, "model_needed")


def test_class_scores_come_only_if_they_are_named(live: Live) -> None:
    document = {"inputs": [IMAGE], "outputs": [{"name": "class_scores"}, {"name": "labels"}]}
    answer = live.client.post("/v2/models/fake/infer", json=document).json()
    [scores, labels] = answer["outputs"]
    assert (scores["datatype"], scores["shape"], labels["data"]) == ("FP32", [2, 3], [1, 2])
    assert scores["data"] == pytest.approx([0.2, 0.8, 0, 0.92, 0, 0.08])
    unnamed = live.client.post("/v2/models/fake/infer", json={"inputs": [IMAGE]}).json()
    assert "class_scores" not in [one["name"] for one in unnamed["outputs"]]
    refused = live.client.post(
        "/v2/models/fake/infer", json={"inputs": [IMAGE], "parameters": {"extras": "class_scores"}}
    )
    assert (refused.status_code, "parameter 'extras'" in refused.json()["error"]) == (422, True)
