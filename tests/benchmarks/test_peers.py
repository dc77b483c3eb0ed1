"""The other servers run beside ours, if they are installed; that they find the same objects is judged here by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from tests.benchmarks.test_smoke import tables


def found(*boxes: tuple[float, float, float, float], score: float = 0.9, label_id: int = 1) -> list[dict[str, Any]]:
    return [{"box": list(box), "score": score, "label_id": label_id} for box in boxes]


def test_same_objects_in_another_order_agree() -> None:
    ours, theirs = found((0, 0, 9, 9), (20, 20, 30, 30)), found((20, 20, 30, 30.25), (0, 0, 9, 9))
    assert peers.compare(ours, theirs) == (0.25, 1.0)


@pytest.mark.parametrize("theirs", [[], found((0, 0, 9, 9), label_id=2), found((0, 0, 9, 9), (40, 40, 50, 50))])
def test_an_object_too_many_or_too_few_is_a_difference(theirs: list[dict[str, Any]]) -> None:
    assert peers.compare(found((0, 0, 9, 9)), theirs)[0] >= 40
    assert peers.compare(theirs, found((0, 0, 9, 9)))[0] >= 40


def test_uncertain_objects_do_not_count() -> None:
    assert peers.compare(found((0, 0, 9, 9)), [*found((0, 0, 9, 9)), *found((1, 1, 2, 2), score=0.3)]) == (0, 1)


def test_masks_are_compared() -> None:
    left, all_of_it = ({"size": [1, 4], "counts": counts} for counts in ("022", "04"))
    one = [{**found((0, 0, 9, 9))[0], "mask": left}]
    other = [{**found((0, 0, 9, 9))[0], "mask": all_of_it}]
    assert peers.compare(one, other) == (0, 0.5)


def test_without_the_others_it_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "ENVIRONMENT", tmp_path)
    peers.main(out=tmp_path)
    assert "python -m benchmarks.peers --set-up installs them" in capsys.readouterr().out


def test_all_of_them_run(tmp_path: Path) -> None:
    if not peers.python().exists():
        pytest.skip("the other servers are not installed: python -m benchmarks.peers --set-up")
    peers.main(quick=True, out=tmp_path)
    written = tables(tmp_path, "peers")
    agreement, sides, ratios = written[peers.AGREEMENT], written[peers.SIDES], written[peers.RATIOS]
    assert [row["server"] for row in agreement] == list(peers.NAMES.values())
    assert all(float(row["largest box difference, pixels"]) <= 1 for row in agreement)
    assert all(float(row["smallest mask IoU"]) > 0.9 for row in agreement)
    assert {row["errors"] for row in sides} == {"0.0 %"}
    assert [row["callers"] for row in ratios] == [1, 2]
    assert not any(math.isnan(row["p50 ms"]) for row in sides)
