"""Draw the pictures of `roi-operators.md` and print its table: `python -m docs.draw_roi_operators`.
Where an operator samples is not drawn from a formula: each is given a map of positions, whose cells hold the place in
the image where they stand, and so answers with the places that it read.

A cell stands at its middle here, (i + 0.5) * stride; all positions are in image pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from service.ops import crop, roi_align, roi_align_max, roi_pool, roi_warp, spp

FOLDER = Path(__file__).parent / "images"
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072b2", "#d55e00", "#009e73", "#c8c8c8", "#222222"
Operator = Callable[..., Tensor]
# (x1, y1, x2, y2)
Box = tuple[float, float, float, float]


def main() -> None:
    """Write the pictures beside the page and print the table that stands in it."""
    FOLDER.mkdir(exist_ok=True)
    for name, picture in pictures().items():
        (FOLDER / name).write_text(picture, encoding="utf-8")
    print(landing_table())


def pictures() -> dict[str, str]:
    """File name to SVG text of every picture."""
    return {
        "roi-misalignment.svg": draw_misalignment(),
        "roi-sampling.svg": draw_sampling(),
        "roi-landing.svg": draw_landing(),
    }


# Asking an operator where it reads.


def position_map(stride: float, side: int) -> Tensor:
    """(1, 2, side, side) float64: the x and the y at which each cell stands."""
    at = (torch.arange(side, dtype=torch.float64) + 0.5) * stride
    return torch.stack([at.expand(side, side), at.unsqueeze(1).expand(side, side)]).unsqueeze(0)


def places_read(
    op: Operator, box: Box, output_size: int | tuple[int, ...], stride: float, *, side: int = 25
) -> tuple[Tensor, Tensor]:
    """The first and the last place that each bin reads.

    Args:
        op: any operator; one that takes maxima answers with the last place, and on a negated map with the first.
        box: in image pixels.
        output_size: handed to the operator.
        stride: of the feature map.
        side: of the feature map, in cells.

    Returns:
        Two (2, h, w) tensors of x and y. They are the same for an operator that averages: the middle of what it reads.
    """
    positions, boxes = position_map(stride, side), [torch.tensor([box], dtype=torch.float64)]
    last = op(positions, boxes, output_size, 1 / stride)
    first = -op(-positions, boxes, output_size, 1 / stride)
    return first[0], last[0]


def landing_errors(op: Operator, stride: float, *, side: float, bins: int = 7) -> tuple[list[float], Tensor]:
    """How far each bin's middle lands from where it should, for a box that is moved to the right by one stride.

    Returns:
        The left edges of the box, and (edges, bins) pixels; above 0 means too far to the right.
    """
    edges = [(2 + (shift + 0.5) / 64) * stride for shift in range(64)]
    should = (torch.arange(bins, dtype=torch.float64) + 0.5) * side / bins
    errors = []
    for edge in edges:
        first, last = places_read(op, (edge, 2 * stride, edge + side, 2 * stride + side), bins, stride)
        errors.append((first[0, 0] + last[0, 0]) / 2 - edge - should)
    return edges, torch.stack(errors)


SHOWN: dict[str, Operator] = {
    "roi_pool": roi_pool,
    "roi_warp": roi_warp,
    "roi_warp, aligned": partial(roi_warp, aligned=True),
    "roi_align": partial(roi_align, sampling_ratio=2),
    "roi_align, aligned": partial(roi_align, sampling_ratio=2, aligned=True),
}


def landing_table() -> str:
    """Each operator's mean error and how far its bins vary around it, by stride, as Markdown."""
    strides = (4, 8, 16, 32)
    lines = ["| | " + " | ".join(f"stride {stride}" for stride in strides) + " |", "|---|---|---|---|---|"]
    for name, op in SHOWN.items():
        cells = []
        for stride in strides:
            _, errors = landing_errors(op, stride, side=64)
            offset = float(errors.mean())
            cells.append(f"{offset:.1f} ± {float((errors - offset).abs().max()):.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("-0.0", "0.0")


# The pictures.


def draw_misalignment() -> str:
    """The worked example: an 800 x 800 image, a box of 665 x 665, a map of stride 32 and 7 x 7 bins."""
    box = (64.0, 64.0, 729.0, 729.0)
    pooled_first, pooled_last = places_read(roi_pool, box, 7, 32)
    cells = float(pooled_first.min()) - 16, float(pooled_last.max()) + 16
    panels = [
        ("the box on the 25 × 25 map", "665 / 32 = 20.78 cells wide", []),
        ("cut off, as the example is told", "20.78 → 20 cells, 20 / 7 = 2.86 → 2", squares(64, 64, 64, 7)),
        (
            "roi_pool: rounded, bins share cells",
            f"22 cells ({cells[0]:.0f} to {cells[1]:.0f}), bins of 4",
            [
                (float(x1) - 16, float(y1) - 16, float(x2) + 16, float(y2) + 16)
                for (x1, y1), (x2, y2) in zip(per_bin(pooled_first), per_bin(pooled_last), strict=True)
            ],
        ),
        ("roi_align: nothing rounded", "7 bins of 95 pixels, 2.97 cells", squares(64, 64, 95, 7)),
    ]
    drawn = []
    for index, (title, subtitle, bins) in enumerate(panels):
        left, top, zoom = 20 + index % 2 * 340, 50 + index // 2 * 390, 320 / 800
        drawn += [words(left, top - 24, title, bold=True), words(left, top - 7, subtitle)]
        drawn += grid(left, top, 320, 25)
        drawn += [rectangle(left, top, zoom, part, ORANGE, fill=ORANGE) for part in bins]
        drawn.append(rectangle(left, top, zoom, box, BLUE, width=2))
    return svg(700, 800, drawn)


def draw_sampling() -> str:
    """Where each operator reads for one box of 5.3 x 4.6 cells of a stride-32 map, with 2 x 2 bins."""
    stride, box = 32.0, (43.0, 49.0, 43 + 5.3 * 32, 49 + 4.6 * 32)
    x1, y1, x2, y2 = (round(side / stride) * stride for side in box)
    points = partial(roi_align, sampling_ratio=1, aligned=True)
    panels: list[tuple[str, str, list[str]]] = [
        ("roi_pool", "maximum over whole cells, shared by bins", cells_read(roi_pool, box, 2, stride)),
        ("roi_align", "mean of 4 points a bin, nothing rounded", dots(points, box, 4, stride)),
        ("roi_align_max", "maximum of the same points", largest_and_other_dots(box, stride)),
        ("roi_warp", "1 point a bin, of the rounded box", dots(partial(roi_warp, aligned=True), box, 2, stride)),
        ("spp", "roi_pool with 2 × 2 bins and with 1", cells_read(spp, box, (2, 1), stride)),
        ("crop", "the image's own pixels, with context", crop_dots(box)),
    ]
    drawn = []
    for index, (name, does, inside) in enumerate(panels):
        left, top = 20 + index % 3 * 276, 50 + index // 3 * 320
        drawn += [words(left, top - 24, name, bold=True), words(left, top - 7, does)]
        drawn += grid(left, top, 256, 8) if name != "crop" else [rectangle(left, top, 1, (0, 0, 256, 256), GREY)]
        drawn += [f'<g transform="translate({left} {top})">', *inside, "</g>"]
        if name in ("roi_pool", "roi_warp", "spp"):
            # RoI Pool's last cell belongs to the box, RoI Warp's box ends where that cell begins.
            end = stride if name != "roi_warp" else 0
            drawn.append(rectangle(left, top, 1, (x1, y1, x2 + end, y2 + end), ORANGE, width=1.5, dashed=True))
        drawn.append(rectangle(left, top, 1, box, BLUE, width=2))
    return svg(848, 640, drawn)


def draw_landing() -> str:
    """How far the first of 7 bins lands from its place, while a box 170 wide moves by one cell of a stride-32 map."""
    left, top, wide, high, reach = 70, 30, 420, 300, 36.0
    colours = dict(zip(SHOWN, ("#cc79a7", ORANGE, ORANGE, BLUE, BLUE), strict=True))
    drawn = []
    for pixels in (-32, -16, 0, 16, 32):
        y = top + high / 2 - pixels / reach * high / 2
        drawn += [line(left, y, left + wide, y, GREY), words(left - 10, y + 4, str(pixels), end=True)]
    for pixels in (0, 8, 16, 24, 32):
        x = left + pixels / 32 * wide
        drawn += [line(x, top, x, top + high, GREY), words(x, top + high + 18, str(pixels), middle=True)]
    for number, (name, op) in enumerate(SHOWN.items()):
        edges, errors = landing_errors(op, 32, side=170)
        at = [
            (left + (edge - 64) / 32 * wide, top + high / 2 - error / reach * high / 2)
            for edge, error in zip(edges, errors[:, 0].tolist(), strict=True)
        ]
        dashed = "aligned" in name
        drawn += [curve(part, colours[name], dashed=dashed) for part in unbroken(at)]
        y = top + 20 + number * 24
        drawn += [curve([(510, y), (545, y)], colours[name], dashed=dashed), words(553, y + 4, name)]
    drawn.append(words(left, top - 10, "pixels too far to the right", bold=True))
    drawn.append(words(left + wide / 2, top + high + 38, "pixels by which the box was moved", middle=True))
    return svg(700, 385, drawn)


def cells_read(op: Operator, box: Box, output_size: int | tuple[int, ...], stride: float) -> list[str]:
    """The cells that each bin takes its maximum from, one translucent square a bin."""
    first, last = places_read(op, box, output_size, stride)
    half = stride / 2
    parts = [
        (x1 - half, y1 - half, x2 + half, y2 + half)
        for (x1, y1), (x2, y2) in zip(per_bin(first), per_bin(last), strict=True)
    ]
    return [rectangle(0, 0, 1, part, ORANGE, fill=ORANGE) for part in parts]


def dots(op: Operator, box: Box, output_size: int, stride: float, colour: str = ORANGE) -> list[str]:
    """The one point that each bin reads."""
    return [dot(x, y, colour) for x, y in per_bin(places_read(op, box, output_size, stride)[1])]


def largest_and_other_dots(box: Box, stride: float) -> list[str]:
    """RoI Align's points; full are those with the largest value, on features that grow to the right and downwards."""
    every = dots(partial(roi_align, sampling_ratio=1, aligned=True), box, 4, stride, GREY)
    return every + dots(partial(roi_align_max, sampling_ratio=2, aligned=True), box, 2, stride)


def crop_dots(box: Box) -> list[str]:
    """Every pixel of a 12 x 12 crop with 2 pixels of context, in grey, read from an image of 256 x 256."""
    x1, y1, x2, y2 = box
    places = per_bin(places_read(partial(crop, padding=2), box, 12, stride=1, side=256)[1])
    return [dot(x, y, ORANGE if x1 < x < x2 and y1 < y < y2 else GREY) for x, y in places]


def per_bin(places: Tensor) -> list[tuple[float, float]]:
    """(2, h, w) as a list of (x, y), row by row."""
    return [(float(x), float(y)) for x, y in places.flatten(1).T.tolist()]


def squares(x: float, y: float, side: float, count: int) -> list[Box]:
    """`count` x `count` squares side by side, from (x, y)."""
    return [
        (x + column * side, y + row * side, x + (column + 1) * side, y + (row + 1) * side)
        for row in range(count)
        for column in range(count)
    ]


def unbroken(points: list[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    """Cut a line where it jumps, so that no stroke is drawn that no operator made."""
    start = 0
    for index in range(1, len(points) + 1):
        if index == len(points) or abs(points[index][1] - points[index - 1][1]) > 20:
            yield points[start:index]
            start = index


# SVG, as text.


def svg(width: int, height: int, elements: list[str]) -> str:
    """A whole file, on white, so that it can be read on a dark page too."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="white"/>', *elements, "</svg>", ""])


def grid(left: float, top: float, side: float, cells: int) -> list[str]:
    """The cells of a feature map."""
    at = [side * index / cells for index in range(cells + 1)]
    return [line(left + x, top, left + x, top + side, GREY) for x in at] + [
        line(left, top + y, left + side, top + y, GREY) for y in at
    ]


def rectangle(
    left: float,
    top: float,
    zoom: float,
    box: Box,
    colour: str,
    *,
    width: float = 1,
    fill: str = "none",
    dashed: bool = False,
) -> str:
    """A box in image pixels, drawn from (left, top)."""
    x1, y1, x2, y2 = (side * zoom for side in box)
    dash = ' stroke-dasharray="5 3"' if dashed else ""
    return (
        f'<rect x="{number(left + x1)}" y="{number(top + y1)}" width="{number(x2 - x1)}" height="{number(y2 - y1)}" '
        f'fill="{fill}" fill-opacity="0.15" stroke="{colour}" stroke-width="{width}"{dash}/>'
    )


def line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """A thin stroke."""
    return f'<path d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}" stroke="{colour}" stroke-width="0.6"/>'


def curve(points: list[tuple[float, float]], colour: str, *, dashed: bool) -> str:
    """A thick line through points."""
    dash = ' stroke-dasharray="7 4"' if dashed else ""
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'


def dot(x: float, y: float, colour: str) -> str:
    """A place that is read."""
    return f'<circle cx="{number(x)}" cy="{number(y)}" r="4" fill="{colour}"/>'


def words(x: float, y: float, text: str, *, bold: bool = False, middle: bool = False, end: bool = False) -> str:
    """One line of text."""
    anchor = ' text-anchor="middle"' if middle else ' text-anchor="end"' if end else ""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{number(x)}" y="{number(y)}" fill="{BLACK}"{anchor}{weight}>{text}</text>'


def number(value: float) -> str:
    """Two digits after the point at most: more cannot be seen, and the last ones may differ between machines."""
    return f"{round(value, 6):.2f}".rstrip("0").rstrip(".")


if __name__ == "__main__":
    main()
