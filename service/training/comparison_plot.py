"""The comparison of RoI operators as a picture: bars of average precision."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from service.training.comparing import Run, by_operator
from service.training.figures import FIGURES
from service.training.svg import (
    COLOURS,
    MARGIN,
    PANEL_HEIGHT,
    PANEL_WIDTH,
    axis_top,
    document,
    horizontal_lines,
    legend,
    text,
)

AXIS_TITLE = "average precision, percent"


def draw_bars(runs: Sequence[Run], *, title: str) -> str:
    """An SVG document: a panel for boxes and one for masks, in each a bar with its value for every figure and operator,
    and a line of one standard deviation up and down where there are several runs. Where the data set has no object for
    a figure, it says so.
    """
    kinds = [kind for kind, _ in runs[0].evaluation.rows()]
    width, height = PANEL_WIDTH + 2 * MARGIN, len(kinds) * (PANEL_HEIGHT + 2 * MARGIN) + MARGIN
    parts = [text(MARGIN, 24, title, size=15), *legend(list(by_operator(runs)), y=44)]
    for index, kind in enumerate(kinds):
        parts += _panel(runs, kind, bottom=(index + 1) * (PANEL_HEIGHT + 2 * MARGIN))
    return document(parts, width=width, height=height)


def _panel(runs: Sequence[Run], kind: str, *, bottom: float) -> Iterator[str]:
    ops = {
        op: {name: [100 * getattr(dict(run.evaluation.rows())[kind], name) for run in of_op] for name in FIGURES}
        for op, of_op in by_operator(runs).items()
    }
    means = [statistics.fmean(values) for figures in ops.values() for values in figures.values()]
    top = axis_top(max((mean for mean in means if mean == mean), default=100.0), at_most=100.0)
    yield from horizontal_lines(bottom=bottom, top_value=top, title=AXIS_TITLE)
    step = PANEL_WIDTH / len(FIGURES)
    bar = 0.8 * step / len(ops)
    for group, (name, label) in enumerate(FIGURES.items()):
        left = MARGIN + (group + 0.1) * step
        middle = left + 0.4 * step
        yield text(middle, bottom + 18, f"{kind} {label}", anchor="middle")
        bars = [figures[name] for figures in ops.values()]
        if all(statistics.fmean(values) != statistics.fmean(values) for values in bars):
            yield text(middle, bottom - 6, "no such object", anchor="middle", size=10)
            continue
        for index, values in enumerate(bars):
            yield from _bar(values, x=left + index * bar, width=bar, bottom=bottom, top_value=top, index=index)


def _bar(
    values: Sequence[float], *, x: float, width: float, bottom: float, top_value: float, index: int
) -> Iterator[str]:
    mean = statistics.fmean(values)
    if mean != mean:
        return
    scale = PANEL_HEIGHT / top_value
    top = bottom - scale * mean
    colour = COLOURS[index % len(COLOURS)]
    yield f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" fill="{colour}"/>'
    spread = scale * statistics.stdev(values) if len(values) > 1 else 0.0
    if spread:
        yield f'<path d="M{x + width / 2:.1f} {top - spread:.1f}v{2 * spread:.1f}" stroke="black"/>'
    yield text(x + width / 2, top - spread - 3, f"{mean:.1f}", anchor="middle", size=min(10, width / 2.4))
