"""Which model a name means, and what the phases of a service's life allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.api.state import Lifecycle, LoadedModels, Phase
from service.errors import ModelNeededError, ModelNotFoundError, NotReadyError
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


def test_model_that_requests_without_a_name_go_to_stays_though_there_is_another() -> None:
    models = loaded(FAKE_INFO, FAKE_BOXES_INFO)
    with pytest.raises(ModelNeededError, match="fake@1"):
        models.remove("fake")
    assert models.remove("fake-boxes") == [FAKE_BOXES_INFO]
    assert models.find(None) == FAKE_INFO


@pytest.mark.parametrize("phase", Phase)
def test_requests_are_taken_in_any_phase_once_there_are_models_and_in_none_before(phase: Phase) -> None:
    lifecycle = Lifecycle()
    lifecycle.phase = phase
    with pytest.raises(NotReadyError, match="loading"):
        lifecycle.require_serving()
    lifecycle.has_models = True
    lifecycle.require_serving()
