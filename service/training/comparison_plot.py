"""The comparison of RoI operators as a picture: bars of average precision, in SVG that is written by hand so that no
plotting library is needed. Called by `roiserve compare`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape

from service.training.comparing import Run, by_operator
from service.training.figures import FIGURES

# Lengths in pixels of the picture.
PANEL_HEIGHT = 200
PANEL_WIDTH = 640
MARGIN = 50
# Told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")


def draw_bars(runs: Sequence[Run], *, title: str) -> str:
    """An SVG document: a panel for boxes and one for masks, in each a bar for every figure and operator, with a line of
    one standard deviation up and down where there are several runs. A figure that the data set has no object for is
    left out.
    """
    kinds = [kind for kind, _ in runs[0].evaluation.rows()]
    width, height = PANEL_WIDTH + 2 * MARGIN, len(kinds) * (PANEL_HEIGHT + 2 * MARGIN) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="15">{escape(title)}</text>',
        *_legend(list(by_operator(runs)), y=44),
    ]
    for index, kind in enumerate(kinds):
        parts += _panel(runs, kind, bottom=(index + 1) * (PANEL_HEIGHT + 2 * MARGIN))
    return "\n".join([*parts, "</svg>", ""])


def _legend(ops: Sequence[str], *, y: float) -> Iterator[str]:
    for index, op in enumerate(ops):
        x = MARGIN + 110 * index
        yield f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{_colour(index)}"/>'
        yield f'<text x="{x + 15}" y="{y}">{escape(op)}</text>'


def _panel(runs: Sequence[Run], kind: str, *, bottom: float) -> Iterator[str]:
    for percent in range(0, 101, 25):
        y = bottom - PANEL_HEIGHT * percent / 100
        yield f'<path d="M{MARGIN} {y}h{PANEL_WIDTH}" stroke="#ddd"/>'
        yield f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{percent}</text>'
    step = PANEL_WIDTH / len(FIGURES)
    ops = by_operator(runs)
    bar = 0.8 * step / len(ops)
    for group, (name, label) in enumerate(FIGURES.items()):
        left = MARGIN + (group + 0.1) * step
        yield f'<text x="{left + 0.4 * step:.1f}" y="{bottom + 18}" text-anchor="middle">{kind} {label}</text>'
        for index, of_op in enumerate(ops.values()):
            values = [getattr(dict(run.evaluation.rows())[kind], name) for run in of_op]
            yield from _bar(values, x=left + index * bar, width=bar, bottom=bottom, colour=_colour(index))


def _bar(values: Sequence[float], *, x: float, width: float, bottom: float, colour: str) -> Iterator[str]:
    mean = statistics.fmean(values)
    if mean != mean:
        return
    top = bottom - PANEL_HEIGHT * mean
    yield f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" fill="{colour}"/>'
    if len(values) > 1:
        spread = PANEL_HEIGHT * statistics.stdev(values)
        yield f'<path d="M{x + width / 2:.1f} {top - spread:.1f}v{2 * spread:.1f}" stroke="black"/>'


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
