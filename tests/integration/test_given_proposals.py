"""A stored network that needs proposals, as its users meet it: over HTTP they give them, offline a search does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.app import create_app
from service.cli import app as command
from service.settings import Settings
from tests.coco_folder import write_coco_folder
from tests.tiny_models import given_proposals, store_untrained


@pytest.fixture(params=["fast_rcnn", "rcnn"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The model discs in store/, and pictures in data/images."""
    store_untrained(tmp_path / "store", "discs", given_proposals(request.param))
    write_coco_folder(tmp_path / "data", train=1, val=1)
    return tmp_path


def test_over_http_the_given_boxes_are_classified_and_their_absence_is_the_callers_fault(folder: Path) -> None:
    picture = (folder / "data" / "images" / "val-0.png").read_bytes()
    settings = Settings(model_store=folder / "store", device="cpu", engine="eager", workers=0)
    with TestClient(create_app(settings)) as client:
        while client.get("/readyz").status_code != 200:
            assert client.get("/healthz").status_code == 200
        none = client.post("/v1/detect", files={"image": picture})
        some = client.post("/v1/detect", files={"image": picture}, data={"proposals": "[[10, 10, 50, 50]]"})
    assert (none.status_code, some.status_code) == (422, 200)
    assert "option 'proposals'" in none.json()["detail"]
    (detection,) = some.json()["detections"]  # one box, one class
    assert detection["label"] == "disc"


def test_offline_the_boxes_come_from_a_search(folder: Path) -> None:
    arguments = ["detect", str(folder / "data" / "images"), "--json", "--store", str(folder / "store")]
    result = CliRunner().invoke(command, [*arguments, "--device", "cpu"], env={"ROISERVE_ENGINE": "eager"})
    assert result.exit_code == 0, (result.output, result.exception)
    documents = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(documents) == 2
    assert all(document["detections"] for document in documents)
