"""Which model a name means, and what the phases of a service's life allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.api.state import Lifecycle, LoadedModels, Phase
from service.errors import ModelNotFoundError, NotReadyError
from service.structures import ModelInfo
from tests.fakes import FAKE_BOXES_INFO, FAKE_INFO


def loaded(*infos: ModelInfo, default: str | None = None) -> LoadedModels:
    models = LoadedModels(default)
    for info in infos:
        models.add(info)
    return models


def test_name_without_version_means_the_highest() -> None:
    models = loaded(replace(FAKE_INFO, version=9), replace(FAKE_INFO, version=10), FAKE_BOXES_INFO)
    assert models.find("fake").version == 10
    assert models.find("fake@9").version == 9


def test_default_is_the_first_model_with_masks_else_the_first() -> None:
    assert loaded(FAKE_BOXES_INFO, FAKE_INFO).find(None).name == "fake"
    other = replace(FAKE_BOXES_INFO, name="other")
    assert loaded(FAKE_BOXES_INFO, other).find(None).name == "fake-boxes"


def test_configured_default_wins() -> None:
    assert loaded(FAKE_INFO, FAKE_BOXES_INFO, default="fake-boxes").find(None).name == "fake-boxes"


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'x' .*: fake-boxes@1, fake@1$"):
        loaded(FAKE_INFO, FAKE_BOXES_INFO).find("x")
    with pytest.raises(ModelNotFoundError, match="no model is loaded"):
        loaded().find(None)


def test_requests_are_taken_when_ready_and_while_draining_but_not_while_loading() -> None:
    lifecycle = Lifecycle()
    with pytest.raises(NotReadyError, match="loading"):
        lifecycle.require_serving()
    for phase in (Phase.READY, Phase.DRAINING):
        lifecycle.phase = phase
        lifecycle.require_serving()
