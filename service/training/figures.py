"""Format average precision for people: in percent with one decimal, like COCO's tables. `AveragePrecision`, JSON and
`model.toml` hold the same figures as pycocotools gives them, from 0 to 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

FIGURES = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}
"""The attributes of `AveragePrecision` that a table shows, and the names of its columns."""

NOTE = "AP in percent; small is under 32 × 32 pixels, large over 96 × 96"
"""The note below a table of `FIGURES`."""


def percent(value: float) -> str:
    """A figure from 0 to 1 in percent, such as `57.3`; `–` for NaN, where the data set has no such object."""
    return mean_and_spread([100 * value])


def mean_and_spread(values: Sequence[float]) -> str:
    """The mean with one decimal, and ± the standard deviation if there are several values; `–` for NaN."""
    mean = statistics.fmean(values)
    if mean != mean:
        return "–"
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"
