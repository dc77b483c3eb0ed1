"""Which models of a store are served, and what of a broken store keeps a server from starting."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from service.errors import ModelNotFoundError, ModelStoreError
from service.inference import loading
from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore
from service.modeling.build import build_model
from service.settings import Settings
from service.workers.local import LocalDetector
from service.workers.stored import stored_predictors
from tests.unit.training.test_comparing import CONFIG


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good: a@1, c@1. Broken: a@2 (weights that do not fit), b@1 (no files)."""
    root = tmp_path_factory.mktemp("store")
    good = build_model(CONFIG).state_dict()
    for name, version, weights in (("a", 1, good), ("a", 2, {"weight": torch.zeros(1)}), ("c", 1, good)):
        ModelStore(root).write_model(
            name, version, config=CONFIG, state_dict=weights, provenance=ProvenanceTable(), readme="# x\n"
        )
    (root / "b" / "1").mkdir(parents=True)
    return root


def loaded(root: Path, models: str = "", default_model: str | None = None) -> list[str]:
    settings = Settings(model_store=root, models=models, default_model=default_model, device="cpu")  # type: ignore[arg-type]
    return [predictor.info.key for predictor in stored_predictors(settings)]


def test_broken_models_are_named_in_the_log_and_the_others_served(
    store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert loaded(store) == ["a@1", "c@1"]
    broken = [record.__dict__["fields"]["model"] for record in caplog.records if record.levelno == logging.ERROR]
    assert broken == ["a@2", "b@1"]


def test_broken_model_that_is_named_is_an_error(store: Path) -> None:
    for name in ("a", "b"):
        with pytest.raises(ModelStoreError, match=f"{store}/{name}"):
            loaded(store, f"c,{name}")


def test_store_of_broken_models_only_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a" / "1").mkdir(parents=True)
    with pytest.raises(ModelStoreError, match=r"every model in .* is broken"):
        loaded(tmp_path)


def test_model_that_is_named_twice_is_loaded_once(store: Path) -> None:
    assert loaded(store, "c,c@1,a@1,c") == ["c@1", "a@1"]


def test_unknown_default_model_is_refused_before_any_is_loaded(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with pytest.raises(ModelNotFoundError, match=r"'nope' .*known: c, c@1$"):
        loaded(store, "c", default_model="nope")
    assert "loading model" not in caplog.text
    assert loaded(store, "c", default_model="c") == ["c@1"]
    assert "loading model" in caplog.text


async def test_model_that_is_loaded_is_not_built_a_second_time(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("built again")

    settings = Settings(model_store=store, models=("c",), device="cpu", engine="eager")
    detector = LocalDetector(settings, stored_predictors, lambda name, labels, value, trace_id=None: None)
    await detector.start()
    try:
        monkeypatch.setattr(loading, "load_predictor", fail)
        assert [(await detector.load(reference)).key for reference in ("c", "c@1")] == ["c@1", "c@1"]
        with pytest.raises(ModelNotFoundError):
            await detector.load("nope")
    finally:
        await detector.stop()
