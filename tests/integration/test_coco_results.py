"""`format=coco` and `roiserve detect --coco` write results that pycocotools evaluates as they stand."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from typer.testing import CliRunner

from service.cli import app
from tests.fakes import picture
from tests.integration.conftest import Live
from tests.shared_data import require, write_slice

STORE = Path(__file__).resolve().parents[2] / "model_store"
CAT = {"category_id": 1, "bbox": [0, 0, 32, 48], "score": pytest.approx(0.8)}
DOG = {"category_id": 2, "bbox": [0, 0, 64, 48], "score": pytest.approx(0.08)}


def average_precision(annotations: Path, results: Any, kind: str, max_detections: int) -> float:
    """Exactly what COCO's own scripts do."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    return float(precision[precision > -1].mean())


@pytest.mark.parametrize(
    ("model", "data", "size"), [("nuclei", "nuclei", (256, 256)), ("blood-cells", "bccd", (480, 640))]
)
def test_detect_gets_the_average_precision_that_evaluate_prints(
    model: str, data: str, size: tuple[int, int], tmp_path: Path
) -> None:
    annotations = write_slice(require(data), tmp_path / "data", train=0, val=2, size=size) / "val.json"
    # The data set's ids are its own: categories do not begin at 1.
    document = json.loads(annotations.read_text())
    for one in document["annotations"]:
        one["category_id"] = 100 - 10 * one["category_id"]
    for one in document["categories"]:
        one["id"] = 100 - 10 * one["id"]
    annotations.write_text(json.dumps(document))
    where = ["--model", model, "--store", str(STORE), "--engine", "eager", "--device", "cpu"]
    run = CliRunner().invoke(app, ["evaluate", *where, "--data", str(annotations), "--json"])
    expected = json.loads(run.stdout)
    limit = expected["max_detections"]
    results = tmp_path / "results.json"
    pictures = str(annotations.parent / "images")
    limits = ["--score-thresh", "0", "--max-detections", str(limit)]
    run = CliRunner().invoke(
        app, ["detect", pictures, *where, *limits, "--coco", str(results), "--annotations", str(annotations)]
    )
    assert run.exit_code == 0, run.output
    for rows, kind in (("boxes", "bbox"), ("masks", "segm")):
        if expected[rows] is not None:
            assert expected[rows]["ap"] > 0.2
            got = average_precision(annotations, str(results), kind, limit)
            assert got == pytest.approx(expected[rows]["ap"], abs=1e-4)


@pytest.mark.parametrize(("image_id", "expected"), [("139", 139), ("000139.jpg", 139), ("cat 7.png", "cat 7.png")])
def test_results_have_the_id_that_the_caller_gives(live: Live, image_id: str, expected: int | str) -> None:
    response = live.detect(picture(red=204), format="coco", image_id=image_id)
    assert response.headers["content-type"] == "application/json"
    cat, dog = response.json()
    mask = cat.pop("segmentation")
    assert (cat, dog["bbox"]) == ({"image_id": expected, **CAT}, DOG["bbox"])
    assert mask == live.detect(picture(red=204)).json()["detections"][0]["mask"]


def test_results_have_the_name_or_number_of_their_file(live: Live) -> None:
    names = ["000000000139.png", "C:\\pictures\\b.jpg", "red.png"]
    files = [("image", (name, picture(red=red))) for name, red in zip(names, (204, 0, 51), strict=True)]
    options = {"format": "coco", "masks": "none"}
    found = live.client.post("/v1/detect/batch", files=files, params=options).json()
    assert [one["image_id"] for one in found] == [139, 139, "red.png"]  # nothing is found in the black one
    assert found[0] == {"image_id": 139, **CAT}
    alone = live.client.post("/v1/detect", files=files[2:], params=options).json()
    assert alone == found[2:]
    none = live.client.post("/v1/detect/batch", files=files[1:2], params=options)
    assert none.json() == []


def test_pycocotools_loads_what_is_answered(live: Live, tmp_path: Path) -> None:
    cat = {"id": 1, "image_id": 5, "category_id": 1, "bbox": [0, 0, 32, 48], "area": 32 * 48, "iscrowd": 0}
    annotations = {"images": [{"id": 5, "height": 48, "width": 64}], "annotations": [cat]}
    (tmp_path / "a.json").write_text(json.dumps(annotations | {"categories": [{"id": 1}, {"id": 2}]}))
    results = live.detect(picture(red=204), format="coco", image_id=5).json()
    assert average_precision(tmp_path / "a.json", results, "bbox", 10) == pytest.approx(1)
    assert results[0]["segmentation"]["size"] == [48, 64]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "format=coco needs the image's id: send the option 'image_id'"),
        ({"image_id": 1, "masks": "png"}, "format=coco writes masks as masks=rle, or none of them, got masks=png"),
        ({"image_id": "x" * 201}, "option 'image_id'"),
        ({"format": "yolo"}, "option 'format'"),
    ],
)
def test_what_makes_no_results_is_refused(live: Live, options: dict[str, Any], words: str) -> None:
    response = live.detect(picture(), **{"format": "coco", **options})
    assert (response.status_code, words in response.json()["detail"]) == (422, True), response.text


def test_one_bad_image_fails_a_batch_of_results_and_is_named(live: Live) -> None:
    files = [("image", ("1.png", picture())), ("image", ("2.png", b"no picture"))]
    response = live.client.post("/v1/detect/batch", files=files, params={"format": "coco"})
    assert response.status_code == 415
    assert response.json()["detail"].startswith("2.png: ")
    response = live.client.post("/v1/detect/batch", files=files, params={"format": "coco", "image_id": "1"})
    assert "the files' names give the ids" in response.json()["detail"]


def test_command_says_what_is_wrong_with_annotations(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    rows: dict[str, Any] = {"images": [{"id": 1, "file_name": "b.png"}], "categories": [], "annotations": []}
    (tmp_path / "val.json").write_text(json.dumps(rows))
    command = ["detect", str(tmp_path / "a.png"), "--annotations", str(tmp_path / "val.json")]
    run = CliRunner().invoke(app, command)
    assert "give both" in str(run.exception)
    run = CliRunner().invoke(app, [*command, "--coco", str(tmp_path / "out.json")])
    assert "none of the pictures is one of its images" in str(run.exception)
    rows["images"] = [{"id": 1, "file_name": "x/a.png"}, {"id": 2, "file_name": "y/a.png"}]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    run = CliRunner().invoke(app, [*command, "--coco", str(tmp_path / "out.json")])
    assert "2 images are called a.png" in str(run.exception)
