"""Bars are as high as their figures: 200 pixels are where the axis ends."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from service.training.comparison_plot import AXIS_TITLE, draw_bars
from service.training.svg import COLOURS, PANEL_HEIGHT
from tests.unit.training.test_comparing import run

SVG = "{http://www.w3.org/2000/svg}"


def bars(svg: str, colour: str) -> list[ElementTree.Element]:
    """All rectangles of a colour but the one in the legend."""
    return [one for one in ElementTree.fromstring(svg).iter(f"{SVG}rect") if one.get("fill") == colour][1:]


def test_a_bar_for_every_figure_and_operator_as_high_as_the_figure() -> None:
    svg = draw_bars([run("roi_pool", 0.3), run("roi_align", 0.4)], title="cells")
    # Boxes: AP, AP50, AP75, no AP small, AP medium and large; masks a tenth lower. The highest are 0.6 and 0.5;
    # the axes end at the next round numbers, 0.7 and 0.6, which leaves room for the values.
    expected = [value / 0.7 for value in (0.3, 0.5, 0.4, 0.3, 0.3)] + [
        value / 0.6 for value in (0.2, 0.4, 0.3, 0.2, 0.2)
    ]
    heights = [float(bar.get("height", "")) for bar in bars(svg, COLOURS[0])]
    assert heights == [round(PANEL_HEIGHT * value, 1) for value in expected]
    assert len(bars(svg, COLOURS[1])) == 10


def test_several_runs_have_a_line_of_their_spread() -> None:
    # 29, 30 and 31 percent: standard deviation 1 percent, up and down from the top of the bar. The axes
    # end at 60 and 50.
    svg = draw_bars([run("roi_pool", ap) for ap in (0.29, 0.30, 0.31)], title="cells")
    assert len(bars(svg, COLOURS[0])) == 10
    lines = [one.get("d", "") for one in ElementTree.fromstring(svg).iter(f"{SVG}path") if one.get("stroke") == "black"]
    assert len(lines) == 10
    assert [line.rpartition("v")[2] for line in lines] == ["6.7"] * 5 + ["8.0"] * 5


def test_title_is_text_and_no_markup() -> None:
    svg = ElementTree.fromstring(draw_bars([run("roi_pool", 0.3)], title="<cells> & more"))
    assert "<cells> & more" in [text.text for text in svg.iter(f"{SVG}text")]


def test_axes_have_titles_bars_their_values_and_missing_figures_a_word() -> None:
    svg = ElementTree.fromstring(draw_bars([run("roi_pool", 0.3), run("roi_align", 0.4)], title="cells"))
    words = [one.text for one in svg.iter(f"{SVG}text")]
    assert words.count(AXIS_TITLE) == 2
    assert {"30.0", "40.0", "50.0", "60.0", "20.0"} <= set(words)
    assert words.count("no such object") == 2  # there is no small object, for boxes and for masks
