"""The model card of an imported model: its `README.md`, from what is known of it. Called by `roiserve models import`
and by `pull.py`; whoever trains writes more.
"""

from __future__ import annotations

from service.model_store.model_toml import ProvenanceTable
from service.modeling.config import ModelConfig


def model_card(name: str, config: ModelConfig, provenance: ProvenanceTable) -> str:
    """Markdown."""
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
    rows = [f"| {fact} | {value} |" for fact, value in facts.items() if value]
    return "\n".join([f"# {name}", "", "| | |", "|---|---|", *rows, ""])
