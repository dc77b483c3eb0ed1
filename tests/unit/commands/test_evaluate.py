"""`roiserve evaluate` as a user runs it, with small untrained models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from service.cli import app
from tests.coco_folder import write_coco_folder
from tests.tiny_models import given_proposals, store_untrained
from tests.unit.training.test_comparing import CONFIG


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in data/, and the models discs, and given that needs proposals, in store/."""
    write_coco_folder(tmp_path / "data", train=1)
    store_untrained(tmp_path / "store", "discs", CONFIG)
    store_untrained(tmp_path / "store", "given", given_proposals("fast_rcnn"))
    return tmp_path


def evaluate(folder: Path, *arguments: str, **environment: str) -> Result:
    command = ["evaluate", "--data", str(folder / "data" / "val.json"), "--store", str(folder / "store"), *arguments]
    runner = CliRunner(env={"COLUMNS": "200", "TERM": "dumb", **environment})
    result = runner.invoke(app, [*command, "--device", "cpu"])
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def test_table_and_json_say_what_ran_the_network(folder: Path) -> None:
    chosen = ("--model", "discs", "--engine", "eager", "--precision", "bfloat16")
    assert evaluate(folder, *chosen).stdout.startswith("discs@1 by eager in bfloat16, 2 pictures")
    document = json.loads(evaluate(folder, *chosen, "--json").stdout)
    assert {key: document[key] for key in ("model", "engine", "precision", "num_images")} == {
        "model": "discs@1",
        "engine": "eager",
        "precision": "bfloat16",
        "num_images": 2,
    }


def test_table_is_in_percent_as_that_of_compare_and_json_from_0_to_1(folder: Path) -> None:
    table = evaluate(folder, "--model", "discs", "--engine", "eager").stdout
    ap = json.loads(evaluate(folder, "--model", "discs", "--engine", "eager", "--json").stdout)["boxes"]["ap"]
    assert re.search(rf"^boxes +{100 * ap:.1f} ", table, flags=re.MULTILINE)
    assert "AP in percent" in table


def test_what_an_engine_compiled_is_kept_where_the_environment_says(folder: Path) -> None:
    pytest.importorskip("openvino")
    cache = folder / "engines"
    evaluate(folder, "--model", "discs", "--engine", "openvino", ROISERVE_ENGINE_CACHE_DIR=str(cache))
    assert {file.suffix for file in cache.iterdir()} == {".openvino"}


def test_a_network_whose_callers_give_the_proposals_is_judged_by_those_of_a_search(folder: Path) -> None:
    document = json.loads(evaluate(folder, "--model", "given", "--engine", "eager", "--json").stdout)
    assert document["num_images"] == 2
    assert 0 <= document["boxes"]["ap"] <= 1
