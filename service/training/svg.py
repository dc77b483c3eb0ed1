"""Charts in SVG, written by hand so that no plotting library is needed. Lengths are in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

MARGIN = 50
PANEL_WIDTH = 640
PANEL_HEIGHT = 200
# Distinguishable for colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")

Points = Sequence[tuple[float, float]]


def document(parts: Sequence[str], *, width: float, height: float) -> str:
    """A whole SVG file on white."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" '
        'font-size="12">'
    )
    ground = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def text(x: float, y: float, words: str, *, anchor: str = "start", size: float = 12, turned: bool = False) -> str:
    """Text at a position; with `turned` it reads upwards."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"{turn}>{escape(words)}</text>'


def legend(names: Sequence[str], *, y: float) -> Iterator[str]:
    """A coloured square and a name for each, in a row."""
    x: float = MARGIN
    for index, name in enumerate(names):
        yield f'<rect x="{x:g}" y="{y - 10:g}" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>'
        yield text(x + 15, y, name)
        x += 30 + 7 * len(name)


def horizontal_lines(*, bottom: float, top_value: float, title: str) -> Iterator[str]:
    """Grid lines, numbers and title of a vertical axis from 0 to `top_value`."""
    step = tick_step(top_value)
    for number in range(math.floor(top_value / step + 1e-9) + 1):
        y = bottom - PANEL_HEIGHT * number * step / top_value
        yield f'<path d="M{MARGIN} {y:.1f}h{PANEL_WIDTH}" stroke="#ddd"/>'
        yield text(MARGIN - 6, y + 4, f"{number * step:g}", anchor="end")
    yield text(14, bottom - PANEL_HEIGHT / 2, title, anchor="middle", turned=True)


def tick_step(top_value: float) -> float:
    """A round step (1, 2 or 5 times a power of ten) that gives 4 to 10 lines up to a value."""
    power: float = 10 ** math.floor(math.log10(top_value / 4))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= top_value / 4 * (1 + 1e-9))


def axis_top(largest: float, *, at_most: float = math.inf) -> float:
    """The end of an axis that shows a value: the next round number."""
    if not largest > 0:
        return min(1.0, at_most)
    step = tick_step(largest)
    return min(step * math.ceil(largest / step + 1e-9), at_most)


@dataclass(frozen=True, slots=True)
class Panel:
    """Lines over a common axis.

    Attributes:
        top: where it begins.
        last_x: where the horizontal axis ends; it begins at 0.
        values: the points of each line by name.
        at_most: upper limit for the end of the vertical axis.
    """

    top: float
    last_x: float
    values: Mapping[str, Points]
    x_title: str
    y_title: str
    at_most: float = math.inf

    @property
    def bottom(self) -> float:
        """Where its horizontal axis is."""
        return self.top + PANEL_HEIGHT + 10

    @property
    def top_value(self) -> float:
        """Where its vertical axis ends."""
        return axis_top(
            max((y for points in self.values.values() for _, y in points), default=1.0), at_most=self.at_most
        )

    def axes(self) -> Iterator[str]:
        """Lines, numbers and titles."""
        yield from horizontal_lines(bottom=self.bottom, top_value=self.top_value, title=self.y_title)
        step = max(1.0, tick_step(self.last_x)) if self.last_x > 0 else 1.0
        for number in range(math.floor(self.last_x / step) + 1):
            yield text(self._x(number * step), self.bottom + 18, f"{number * step:g}", anchor="middle")
        yield text(MARGIN + PANEL_WIDTH / 2, self.bottom + 36, self.x_title, anchor="middle")

    def line(self, points: Points, colour: str) -> str:
        """A line through the points, with a dot at each if they are few."""
        places = [(self._x(x), self.bottom - PANEL_HEIGHT * y / self.top_value) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places)
        line = f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        return line + (dots if len(places) <= 40 else "")

    def _x(self, value: float) -> float:
        return MARGIN + PANEL_WIDTH * value / max(self.last_x, 1e-9)
