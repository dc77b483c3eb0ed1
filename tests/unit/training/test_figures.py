"""Figures are printed in one unit wherever people read them."""

from __future__ import annotations

import pytest

from service.training.figures import mean_and_spread, percent


@pytest.mark.parametrize(("value", "text"), [(0.573, "57.3"), (0.0, "0.0"), (1.0, "100.0"), (float("nan"), "–")])
def test_a_figure_is_printed_in_percent(value: float, text: str) -> None:
    assert percent(value) == text


def test_several_runs_are_their_mean_and_standard_deviation() -> None:
    assert mean_and_spread([29.0, 31.0]) == "30.0 ± 1.4"  # the square root of ((-1)² + 1²) / (2 - 1)
    assert mean_and_spread([30.0, float("nan")]) == "–"
