"""`roiserve compare` as a user runs it, with a small untrained model."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner, Result

from service.cli import app
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.modeling.build import build_model
from service.modeling.proposals import selective_search
from tests.coco_folder import write_coco_folder
from tests.tiny_models import given_proposals, store_untrained
from tests.unit.training.test_comparing import CONFIG


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with the model discs@1, and the folder data/ beside it."""
    torch.manual_seed(0)
    write_coco_folder(tmp_path / "data", train=4)
    weights = build_model(CONFIG).state_dict()
    ModelStore(tmp_path / "store").write_model(
        "discs", 1, config=CONFIG, state_dict=weights, provenance=ProvenanceTable(licence="CC0-1.0"), readme="# discs\n"
    )
    return tmp_path / "store"


def compare(store: Path, *arguments: str | Path) -> Result:
    data = store.parent / "data" / "val.json"
    command = ["compare", "--model", "discs", "--data", data, "--store", store, "--device", "cpu", *arguments]
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(one) for one in command])


def test_one_set_of_weights_is_compared_under_the_named_operators(store: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "compared.md", tmp_path / "compared.svg"
    result = compare(store, "--roi-op", "roi_pool,roi_align", "--out", out, "--plot", plot)
    assert result.exit_code == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| roi_")]
    assert [row[:2] for row in rows] == [
        ["roi_pool", "boxes"],
        ["roi_align", "boxes"],
        ["roi_pool", "masks"],
        ["roi_align", "masks"],
    ]
    for row in rows:
        assert " ".join(row[2:]) in " ".join(result.stdout.split())
    assert plot.read_text().startswith("<svg")


def test_retraining_reports_a_spread_over_the_seeds(store: Path, tmp_path: Path) -> None:
    training = ["--retrain", "--train-data", str(tmp_path / "data"), "--runs-dir", str(tmp_path / "runs")]
    quickly = ["--epochs", "1", "--crop-size", "96", "--warmup-steps", "0"]
    result = compare(store, "--roi-op", "roi_pool", "--seeds", "2", *training, *quickly)
    assert result.exit_code == 0, result.output
    assert "±" in result.stdout
    assert sorted(path.parent.name for path in (tmp_path / "runs").glob("*/state.pt")) == [
        "discs@1-roi_pool-0",
        "discs@1-roi_pool-1",
    ]


def test_a_network_that_was_never_trained_is_compared_from_its_configuration(store: Path, tmp_path: Path) -> None:
    config, data = store / "discs" / "1" / "model.toml", tmp_path / "data"
    training = ["--retrain", "--train-data", data, "--runs-dir", tmp_path / "runs", "--epochs", 1, "--crop-size", 96]
    command = ["compare", "--model-config", config, "--data", data / "val.json", "--roi-op", "roi_pool", *training]
    result = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(app, [str(one) for one in command])
    assert result.exit_code == 0, result.output
    assert [path.parent.name for path in (tmp_path / "runs").glob("*/state.pt")] == ["model-roi_pool-0"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--roi-op", "roi_pool,magic"], "'magic'; it can take: roi_pool, roi_align"),
        (["--roi-op", ","], "cannot take the RoI operator ','"),
        (["--retrain"], "--train-data"),
        (["--model-config", "model.toml"], "either --model NAME, or --retrain with --model-config FILE"),
    ],
)
def test_what_cannot_be_compared_is_said_at_once(store: Path, arguments: list[str], words: str) -> None:
    result = compare(store, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_a_network_whose_callers_give_the_proposals_is_compared_with_one_search_a_picture(
    store: Path, tmp_path: Path
) -> None:
    store_untrained(store, "given", given_proposals("fast_rcnn"))
    out = tmp_path / "compared.md"
    with patch("service.training.proposals.selective_search", wraps=selective_search) as search:
        result = compare(store, "--model", "given", "--roi-op", "roi_pool,roi_align", "--out", out)
    assert result.exit_code == 0, result.output
    assert [line.split()[1:4] for line in out.read_text().splitlines() if line.startswith("| roi_")] == [
        ["roi_pool", "|", "boxes"],
        ["roi_align", "|", "boxes"],
    ]
    assert search.call_count == 2  # val.json has two pictures
