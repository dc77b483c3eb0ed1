"""The result of checking a data set: fatal problems, bad annotations, repairs, and notes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

MAX_LISTED = 50
"""How many problems of one kind a report lists individually."""


@dataclass(slots=True, eq=False)
class DataReport:
    """Findings in one annotation file, in the order in which they were made.

    Attributes:
        path: the annotation file.
        stopping: what must be fixed before the data can be used.
        bad: problems of single annotations, which can be left out.
        repaired: how often something was interpreted differently from what is written.
        left_out: how many annotations do not count, by reason.
        notes: things that are no problem, but good to know.
    """

    path: Path
    stopping: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    repaired: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A line for everything that was repaired or left out, and the notes; none for a flawless file."""
        return [
            *(f"repaired: {count} {what}" for what, count in self.repaired.items()),
            *(f"left out: {count} {what}" for what, count in self.left_out.items()),
            *(f"note: {note}" for note in self.notes),
        ]

    def refusal(self, *, drops_bad: bool) -> str:
        """The error message for a rejected data set: fatal problems first, then those that could be left out.

        Args:
            drops_bad: whether bad annotations are left out anyway.
        """
        number = len(self.stopping) + (0 if drops_bad else len(self.bad))
        lines = [f"{self.path}: {number} problem(s) in the data set", *_listed(self.stopping)]
        if self.bad and drops_bad:
            lines.append(f"  The {len(self.bad)} bad annotation(s) would be left out; what stands above still stops.")
        elif self.bad:
            if self.stopping:
                lines.append("  Bad annotations, which --drop-bad-annotations would leave out:")
            lines += _listed(self.bad)
            if self.stopping:
                lines.append("  --drop-bad-annotations does not help against what stands above them.")
            else:
                lines.append(f"  --drop-bad-annotations goes on without these {len(self.bad)} annotation(s).")
        return "\n".join(lines)


def _listed(problems: list[str]) -> Iterator[str]:
    yield from (f"  {problem}" for problem in problems[:MAX_LISTED])
    if len(problems) > MAX_LISTED:
        yield f"  … and {len(problems) - MAX_LISTED} more"
