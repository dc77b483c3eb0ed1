"""Hugging Face's own client gets what `/v1/detect` finds, in the forms of its tasks."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.fakes import picture
from tests.integration.conftest import Live

PICTURE = picture(red=204)


def client(live: Live, path: str) -> InferenceClient:
    return InferenceClient(model=f"{live.url}/hf/{path}", token="unused")


@pytest.mark.parametrize("path", ["fake", "fake@1", "fake-boxes", "fake/object-detection"])
def test_client_detects_objects(live: Live, path: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PICTURE)
    found = client(live, path).object_detection(str(tmp_path / "a.png"))
    assert [one.label for one in found] == ["cat", "dog"]
    assert [one.score for one in found] == pytest.approx([0.8, 0.08])
    box = found[0].box
    assert (box.xmin, box.ymin, box.xmax, box.ymax) == (0, 0, 32, 48)
    assert isinstance(box.xmin, int)


def test_client_sets_a_threshold(live: Live) -> None:
    assert [one.label for one in client(live, "fake").object_detection(PICTURE, threshold=0.5)] == ["cat"]


@pytest.mark.parametrize("path", ["fake", "fake/image-segmentation"])
def test_client_segments(live: Live, path: str) -> None:
    [cat] = client(live, path).image_segmentation(PICTURE, threshold=0.5, subtask="instance", mask_threshold=0.5)
    mask = np.asarray(cat.mask)
    assert (cat.label, mask.shape) == ("cat", (48, 64))
    assert mask[2:-2, 2:30].all()
    assert not mask[:, 34:].any()


@pytest.mark.parametrize(
    ("path", "options", "status", "words"),
    [
        ("x", {}, 404, "no model 'x' is loaded"),
        ("fake", {"subtask": "panoptic"}, 422, "parameter 'subtask': expected 'instance' or none, got 'panoptic'"),
        ("fake", {"mask_threshold": 0.7}, 422, "parameter 'mask_threshold': expected 0.5"),
        ("fake-boxes/image-segmentation", {}, 422, "needs a model with masks"),
    ],
)
def test_client_gets_errors_in_words(
    live: Live, path: str, options: dict[str, object], status: int, words: str
) -> None:
    with pytest.raises(HfHubHTTPError) as raised:
        client(live, path).image_segmentation(PICTURE, **options)  # type: ignore[arg-type]
    assert raised.value.response.status_code == status
    assert words in raised.value.response.json()["error"]


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"parameters": {}}, "option 'inputs': field required"),
        ({"inputs": "http://a/b.jpg"}, "addresses are not fetched"),
        ({"inputs": base64.b64encode(PICTURE).decode(), "parameters": {"treshold": 1}}, "unknown option 'treshold'"),
        ({"inputs": base64.b64encode(PICTURE).decode(), "parameters": {"masks": "rle"}}, "parameter 'masks'"),
        ({"inputs": base64.b64encode(PICTURE).decode(), "parameters": {"threshold": "1"}}, "option 'threshold'"),
        ({"inputs": base64.b64encode(PICTURE).decode(), "parameters": {"score_thresh": 2}}, "option 'threshold'"),
    ],
)
def test_wrong_document_is_refused_in_words(live: Live, document: dict[str, object], words: str) -> None:
    response = live.client.post("/hf/fake", json=document)
    assert (response.status_code, words in response.json()["error"]) == (422, True), response.text
