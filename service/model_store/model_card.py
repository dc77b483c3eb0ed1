"""Model cards: a model's `README.md`, from what is known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from service.model_store.model_toml import ProvenanceTable
from service.modeling.config import ModelConfig


def model_card(
    name: str, config: ModelConfig, provenance: ProvenanceTable, *, rows: Sequence[tuple[str, str, str]] = ()
) -> str:
    """The card of an imported model, Markdown.

    Args:
        rows: the settings that affect its results: key, value, and the value's source.
    """
    facts = {
        "architecture": f"`{config.architecture}` on `{config.backbone.name}`, RoI head `{config.roi.op}`",
        "labels": f"{len(config.labels)}: {', '.join(config.labels[:10])}{', …' if len(config.labels) > 10 else ''}",
        "data": provenance.data or "unknown; please fill in",
        "licence": provenance.licence or "unknown; please fill in",
        "attribution": provenance.attribution,
        "metrics": ", ".join(f"{figure} {value}" for figure, value in provenance.metrics.items()),
        "made by": provenance.command and f"`{provenance.command}`",
        "notes": provenance.notes,
    }
    lines = [f"# {name}", "", "| | |", "|---|---|"]
    lines += [f"| {fact} | {value} |" for fact, value in facts.items() if value]
    if rows:
        lines += ["", "## What the import took for granted", "", "| setting | value | from |", "|---|---|---|"]
        lines += [f"| `{key}` | {value} | {source} |" for key, value, source in rows]
    return "\n".join([*lines, ""])


def measured_card(
    title: str, summary: str, facts: Mapping[str, str], sections: Mapping[str, Sequence[str]], *, command: str
) -> str:
    """The card of a model that was made and measured here, Markdown.

    Args:
        facts: the rows of the table at the top.
        sections: lines by heading.
        command: the command line that made it.
    """
    lines = [f"# {title}", "", summary, "", "| | |", "|---|---|"]
    lines += [f"| {fact} | {value} |" for fact, value in facts.items()]
    for heading, text in {**sections, "Command": ["```", command, "```"]}.items():
        lines += ["", f"## {heading}", "", *text]
    return "\n".join([*lines, ""])
