"""What several tests of predictors start from: the small networks of every family, stored, and a folder for engines."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from service.model_store.model_toml import ProvenanceTable
from service.model_store.store import ModelStore, StoredModel
from tests.unit.inference.engines.networks import config_of, weights_of


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], StoredModel]:
    root = tmp_path_factory.mktemp("store")

    @cache
    def stored(family: str) -> StoredModel:
        return ModelStore(root).write_model(
            re.sub(r"[^a-z0-9]+", "-", family),
            1,
            config=config_of(family),
            state_dict=weights_of(family),
            provenance=ProvenanceTable(),
            readme="",
        )

    return stored


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")
