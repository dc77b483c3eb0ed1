"""How the benchmarks measure and report, on numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from benchmarks._measure import (
    Report,
    Spread,
    alternate,
    best_rates,
    count_flop,
    matrix_products,
    milliseconds,
    peak_memory_bytes,
    ratio,
    spread,
)


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([5, 1, 4, 2, 3]) == Spread(2, 3, 4)
    assert spread([7]) == Spread(7, 7, 7)
    assert str(milliseconds([0.001, 0.002, 0.003, 0.004, 0.005])) == "3 (2 – 4)"
    assert str(spread([1234.5])) == "1234 (1234 – 1234)", "no digit before the point is lost"


def test_ratios_are_taken_round_by_round() -> None:
    """4 / 2, 9 / 3 and 40 / 10: the slow third round was slow for both."""
    assert ratio([4, 9, 40], [2, 3, 10]).median == 3


def test_sides_take_turns_after_each_was_called_once() -> None:
    calls: list[str] = []
    seconds = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert "".join(calls) == "ab" + "abab"
    assert [len(one) for one in seconds.values()] == [2, 2]


def test_no_time_leaves_the_least_rounds() -> None:
    calls: list[str] = []
    alternate({"a": lambda: calls.append("a")}, rounds=9, least_rounds=2, most_seconds=0, warm_up=False)
    assert calls == ["a", "a"]


def test_peak_memory_is_what_a_call_needed_though_it_gave_it_back() -> None:
    needed = peak_memory_bytes(lambda: np.ones(64 * 2**20, np.uint8).sum())
    assert 60 * 2**20 < needed < 80 * 2**20


def test_flop_of_a_matrix_product_are_two_for_each_multiply_add() -> None:
    assert count_flop(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == 2 * 2 * 3 * 4
    products, flop = matrix_products(5)
    assert count_flop(products["torch"]) == flop == 2 * 5**3


def test_the_limit_is_the_faster_product_of_each_round() -> None:
    assert best_rates([[2, 4, 5], [4, 1, 5]], 20) == [10, 20, 4]


def test_report_keeps_the_newest_table_of_each_title_in_both_forms(tmp_path: Path) -> None:
    report = Report("speed", tmp_path / "new")
    report.table("Times", ["side", "ms"], [["a", 1.0]])
    report.table("Times", ["side", "ms"], [["a", 1.0], ["b", Spread(1, 2, 3)]])
    document = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert document["command"].startswith("python -m benchmarks.speed")
    assert document["tables"] == [
        {
            "title": "Times",
            "rows": [{"side": "a", "ms": 1.0}, {"side": "b", "ms": {"low": 1, "median": 2, "high": 3}}],
        }
    ]
    assert (
        (tmp_path / "new" / "speed.md")
        .read_text()
        .endswith("Times:\n\n| side | ms |\n| --- | --- |\n| a | 1 |\n| b | 2 (1 – 3) |\n")
    )
