"""CVAT's calls to Nuclio, as `cvat/apps/lambda_manager/views.py` in its source makes them, get what `/v1/detect` finds;
so does a function of `cvat-sdk`, in an environment of its own.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from pycocotools import mask as coco

from service.structures import UInt8Array
from tests.fakes import FAKE_BOXES_INFO, FAKE_INFO, FakePredictor, picture
from tests.integration.conftest import Live, running

SDK = Path(__file__).parents[2] / ".tools/cvat-sdk/bin/python"
PICTURE = picture(red=204)
IMAGE = base64.b64encode(PICTURE).decode()


class Gateway:
    """What CVAT 2.x asks: `LambdaGateway._http` with the invoke method `dashboard`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def http(self, method: str, path: str, headers: dict[str, str], data: object = None) -> Any:
        common = {
            "x-nuclio-project-name": "cvat",
            "x-nuclio-function-namespace": "nuclio",
            "x-nuclio-invoke-via": "domain-name",
            "X-Nuclio-Invoke-Timeout": "120s",
        }
        reply = httpx.request(
            method, self._url + path, headers=common | headers, json=data, timeout=120, trust_env=False
        )
        reply.raise_for_status()
        return reply.json()

    def list(self) -> list[Function]:
        return [Function.parse(self, item) for item in self.http("get", "/api/functions", {}).values()]

    def get(self, name: str) -> Function:
        return Function.parse(self, self.http("get", f"/api/functions/{name}", {}))


@dataclass(frozen=True)
class Function:
    """`LambdaFunction`."""

    gateway: Gateway
    id: str
    name: str
    labels: dict[str, str]

    @classmethod
    def parse(cls, gateway: Gateway, data: dict[str, Any]) -> Function:
        annotations = data["metadata"]["annotations"]
        assert annotations["type"] == "detector"
        spec = json.loads(annotations.get("spec") or "[]")
        names = [label["name"] for label in spec]
        assert len(names) == len(set(names))
        assert all(label.get("attributes", []) == [] for label in spec)
        assert isinstance(data["spec"]["description"], str)
        assert data["status"].get("httpPort") is None  # it would be asked directly, under a name that it cannot tell
        int(annotations.get("version", "1"))
        name = data["metadata"]["name"]
        assert re.fullmatch(r"[a-zA-Z0-9_.-]+", name)  # FunctionViewSet.lookup_value_regex
        types = {label["name"]: label.get("type", "any") for label in spec}
        return cls(gateway, name, annotations.get("name", name), types)

    def invoke(
        self, image: str, threshold: float | None = None, *, conv_mask_to_poly: bool = False
    ) -> list[dict[str, Any]]:
        """Shapes as CVAT stores them: masks as runs, row by row, within a rectangle."""
        payload: dict[str, object] = {"threshold": threshold} if threshold else {}
        payload["image"] = image
        headers = {"x-nuclio-function-name": self.id, "x-nuclio-path": "/"}
        response = self.gateway.http("post", "/api/function_invocations", headers, payload)
        return [self._shape(one, conv_mask_to_poly) for one in response if one["label"] in self.labels]

    @staticmethod
    def _shape(one: dict[str, Any], conv_mask_to_poly: bool) -> dict[str, Any]:
        """`DetectionResultConverter._parse_anno`."""
        shape = {
            "type": one["type"],
            "label": one["label"],
            "group": one.get("group_id"),
            "points": one.get("mask", []) if one["type"] == "mask" else one.get("points", []),
        }
        if one["type"] == "mask" and "points" in one and conv_mask_to_poly:
            return shape | {"type": "polygon", "points": one["points"]}
        if one["type"] == "mask":
            [xtl, ytl, xbr, ybr] = shape["points"][-4:]
            return shape | {"points": [*mask_to_rle(shape["points"][:-4]), xtl, ytl, xbr, ybr]}
        return shape


def mask_to_rle(pixels: list[int]) -> list[int]:
    """`datumaro.util.mask_tools.mask_to_rle` of one column: lengths, from zeros."""
    runs = [len(list(same)) for _, same in groupby(pixels)]
    return [0, *runs] if pixels[0] else runs


def decoded(points: list[float], image_size: tuple[int, int]) -> UInt8Array:
    """`cvat_sdk.masks.decode_mask`."""
    *runs, left, top, right, bottom = map(int, points)
    canvas = np.zeros(image_size, np.uint8)
    pixels = np.repeat(np.arange(len(runs)) & 1, runs)
    canvas[top : bottom + 1, left : right + 1] = pixels.reshape(bottom + 1 - top, right + 1 - left)
    return canvas


@pytest.fixture
def gateway(live: Live) -> Gateway:
    return Gateway(live.url)


def test_every_model_is_listed(gateway: Gateway) -> None:
    functions = {one.id: (one.name, one.labels) for one in gateway.list()}
    assert functions == {
        "fake": ("fake 1 (masks)", {"cat": "mask", "dog": "mask"}),
        "fake.boxes": ("fake 1 (boxes)", {"cat": "rectangle", "dog": "rectangle"}),
        "fake-boxes": ("fake-boxes 1 (boxes)", {"cat": "rectangle", "dog": "rectangle"}),
    }
    assert gateway.get("fake.boxes").labels == {"cat": "rectangle", "dog": "rectangle"}


@pytest.mark.parametrize("function", ["fake-boxes", "fake.boxes"])
def test_boxes_are_rectangles(gateway: Gateway, function: str) -> None:
    cat, dog = gateway.get(function).invoke(IMAGE)
    assert cat == {"type": "rectangle", "label": "cat", "group": None, "points": [0, 0, 32, 48]}
    assert dog["points"] == [0, 0, 64, 48]


def test_masks_are_those_of_detect(live: Live, gateway: Gateway) -> None:
    shapes = gateway.get("fake").invoke(IMAGE)
    detections = live.detect(PICTURE, masks="rle").json()["detections"]
    assert [one["label"] for one in shapes] == ["cat", "dog"]
    for shape, detection in zip(shapes, detections, strict=True):
        assert shape["type"] == "mask"
        assert np.array_equal(decoded(shape["points"], (48, 64)), coco.decode(detection["mask"]))


def test_masks_become_polygons(live: Live, gateway: Gateway) -> None:
    [cat, _] = gateway.get("fake").invoke(IMAGE, conv_mask_to_poly=True)
    [outline] = live.detect(PICTURE, masks="polygons", labels="cat").json()["detections"][0]["mask"]
    assert cat["type"] == "polygon"
    assert len(cat["points"]) >= 6
    corners = set(zip(outline[::2], outline[1::2], strict=True))
    assert set(zip(cat["points"][::2], cat["points"][1::2], strict=True)) <= corners


def test_threshold_is_that_of_the_person(gateway: Gateway) -> None:
    assert [one["label"] for one in gateway.get("fake").invoke(IMAGE, 0.5)] == ["cat"]
    assert gateway.get("fake").invoke(IMAGE, 1) == []


def test_lower_versions_are_listed_beside_the_highest() -> None:
    with running(FakePredictor(), [FakePredictor(replace(FAKE_INFO, version=2))]) as live:
        live.wait_until_ready()
        names = {one.id: one.name for one in Gateway(live.url).list()}
    assert names == {
        "fake.v1": "fake 1 (masks)",
        "fake.v1.boxes": "fake 1 (boxes)",
        "fake": "fake 2 (masks)",
        "fake.boxes": "fake 2 (boxes)",
    }


@pytest.mark.parametrize(
    ("headers", "body", "status", "words"),
    [
        ({}, {"image": IMAGE}, 422, "option 'x-nuclio-function-name': field required"),
        ({"x-nuclio-function-name": "x"}, {"image": IMAGE}, 404, "no function 'x'; there are: fake, fake-boxes"),
        ({"x-nuclio-function-name": "fake"}, {}, 422, "option 'image': field required"),
        ({"x-nuclio-function-name": "fake"}, [], 422, "expected a JSON object"),
        ({"x-nuclio-function-name": "fake"}, {"image": "http://a/b.jpg"}, 422, "addresses are not fetched"),
        ({"x-nuclio-function-name": "fake"}, {"image": "aGVsbG8gd29ybGQ="}, 415, "not like an image"),
        ({"x-nuclio-function-name": "fake"}, {"image": IMAGE, "threshold": 2}, 422, "option 'threshold'"),
        ({"x-nuclio-function-name": "fake"}, {"image": IMAGE, "threshold": "a"}, 422, "option 'threshold'"),
    ],
)
def test_wrong_calls_are_refused_in_words(
    live: Live, headers: dict[str, str], body: object, status: int, words: str
) -> None:
    response = live.client.post("/api/function_invocations", headers=headers, json=body)
    assert (response.status_code, words in response.json()["error"]) == (status, True), response.text


def test_bitmaps_too_large_for_an_answer_are_refused(serve: Callable[..., Live]) -> None:
    own = serve(max_answer_bytes=8000)
    with pytest.raises(httpx.HTTPStatusError) as raised:
        Gateway(own.url).get("fake").invoke(IMAGE)
    assert raised.value.response.status_code == 422
    assert "ask for the function for boxes" in raised.value.response.json()["error"]
    assert len(Gateway(own.url).get("fake.boxes").invoke(IMAGE)) == 2


def test_key_stands_in_the_address(serve: Callable[..., Live]) -> None:
    """CVAT_NUCLIO_HOST may hold user and password."""
    own = serve(api_keys="k" * 32)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        Gateway(own.url).list()
    assert Gateway(own.url.replace("://", f"://cvat:{'k' * 32}@")).list()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What `examples/cvat_function.py` gives to cvat-sdk, see `cvat_sdk_calls.py`."""
    if not SDK.exists():
        pytest.skip("cvat-sdk is not installed: tests/install_tools.sh")
    path = tmp_path_factory.mktemp("cvat") / "picture.png"
    path.write_bytes(PICTURE)
    with running(FakePredictor(), [FakePredictor(FAKE_BOXES_INFO)], api_keys="k" * 32) as live:
        live.wait_until_ready()
        program = Path(__file__).with_name("cvat_sdk_calls.py")
        command = [str(SDK), str(program), live.url, "k" * 32, str(path)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    yield json.loads(run.stdout)


def test_sdk_function_declares_the_labels(said: dict[str, Any]) -> None:
    assert said["labels"] == {
        "fake": [["cat", 1, "mask"], ["dog", 2, "mask"]],
        "fake-boxes": [["cat", 1, "rectangle"], ["dog", 2, "rectangle"]],
    }


def test_sdk_accepts_its_shapes_for_a_task(live: Live, said: dict[str, Any]) -> None:
    """The labels of the task have the ids 101 and 102."""
    assert said["rectangles"] == [["rectangle", 101, [0, 0, 32, 48]], ["rectangle", 102, [0, 0, 64, 48]]]
    [[kind, label, points]] = said["masks"]
    mask = live.detect(PICTURE, masks="rle", labels="cat").json()["detections"][0]["mask"]
    assert (kind, label) == ("mask", 101)
    assert np.array_equal(decoded(points, (48, 64)), coco.decode(mask))
    assert said["pixels"] == int(coco.area(mask))
    assert [(kind, label) for kind, label, _ in said["polygons"]] == [("polygon", 101)]
