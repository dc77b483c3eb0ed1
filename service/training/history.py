"""A run's losses and average precision, step by step: as CSV, and as curves in SVG."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from service.training.evaluation import Evaluation
from service.training.svg import COLOURS, Panel, document, legend, text

_FIGURES = ("ap", "ap50", "ap75")


@dataclass(frozen=True, slots=True)
class Row:
    """The mean losses over some steps, or an evaluation.

    Attributes:
        step: the last of the steps.
        learning_rate: of that step.
        losses: means by name.
        figures: `boxes_ap` etc., 0 to 1, if the run was evaluated after this step.
    """

    step: int
    epoch: int
    learning_rate: float
    losses: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


class History:
    """The rows of a run, and the losses since the last of them."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = list(rows)
        self._pending: list[Mapping[str, float]] = []

    def add_losses(self, losses: Mapping[str, float]) -> None:
        """Record a step's losses."""
        self._pending.append(losses)

    def close_row(self, *, step: int, epoch: int, learning_rate: float, evaluation: Evaluation | None = None) -> None:
        """Make a row of the losses since the last one."""
        count = len(self._pending)
        names = self._pending[0] if count else ()
        losses = {name: math.fsum(one[name] for one in self._pending) / count for name in names}
        figures = {} if evaluation is None else _figures(evaluation)
        self.rows.append(Row(step, epoch, learning_rate, losses, figures))
        self._pending.clear()

    def csv(self) -> str:
        """One line per row; missing figures are empty."""
        losses = list(dict.fromkeys(name for row in self.rows for name in row.losses))
        figures = list(dict.fromkeys(name for row in self.rows for name in row.figures))
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "epoch", "learning_rate", *losses, *figures])
        for row in self.rows:
            values = [row.losses.get(name) for name in losses] + [row.figures.get(name) for name in figures]
            written = ["" if value is None or math.isnan(value) else f"{value:.6g}" for value in values]
            writer.writerow([row.step, row.epoch, f"{row.learning_rate:.6g}", *written])
        return file.getvalue()

    def svg(self, *, title: str) -> str:
        """Two panels over the steps: the losses, and average precision in percent."""
        losses = _series(self.rows, lambda row: row.losses)
        figures = _series(self.rows, lambda row: {name: 100 * value for name, value in row.figures.items()})
        last = max((row.step for row in self.rows), default=1)
        panels = [
            Panel(top=50, last_x=last, values=losses, x_title="step", y_title="loss"),
            Panel(
                top=340, last_x=last, values=figures, x_title="step", y_title="average precision, percent", at_most=100
            ),
        ]
        return document(
            [
                text(50, 24, title, size=15),
                *(part for panel in panels for part in _drawn(panel)),
            ],
            width=740,
            height=630,
        )


def _drawn(panel: Panel) -> Iterator[str]:
    yield from legend([name.replace("_", " ") for name in panel.values], y=panel.top - 6)
    yield from panel.axes()
    for index, points in enumerate(panel.values.values()):
        yield panel.line(points, COLOURS[index % len(COLOURS)])


def _series(
    rows: Sequence[Row], values_of: Callable[[Row], Mapping[str, float]]
) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each name."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in values_of(row).items():
            if math.isfinite(value):
                series.setdefault(name, []).append((row.step, value))
    return series


def _figures(evaluation: Evaluation) -> dict[str, float]:
    return {f"{kind}_{name}": getattr(figures, name) for kind, figures in evaluation.rows() for name in _FIGURES}
