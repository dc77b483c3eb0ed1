"""The model card of a quantised version."""

from __future__ import annotations

from service.model_store.model_card import measured_card
from service.model_store.model_toml import Int8Table, ProvenanceTable
from service.model_store.store import StoredModel
from service.modeling.config import ModelConfig


def card(stored: StoredModel, table: Int8Table, provenance: ProvenanceTable, *, val_pictures: int) -> str:
    """Markdown.

    Args:
        stored: the model that was quantised.
        val_pictures: how many pictures AP was measured on.
    """
    config = stored.model_toml
    kinds = list(table.ap["float32"])
    rows = [
        f"| {precision} | {' | '.join(f'{100 * ap[kind]:.2f}' for kind in kinds)} |"
        for precision, ap in table.ap.items()
    ]
    kept = ", ".join(f"`{layer}`" for layer in table.kept_float)
    return measured_card(
        f"{stored.name}, in int8",
        f"{stored.key} with {_parts(table)} in int8, for the CPU. {config.architecture}, {config.backbone.name}, "
        f"{config.roi.op}. Finds {', '.join(config.labels)}.",
        {
            "data": provenance.data or "not stated",
            "licence": provenance.licence or "not stated",
            "attribution": provenance.attribution or "not stated",
            "calibrated on": f"{table.pictures} pictures, sha256 of their hashes `{table.pictures_sha256[:16]}…`",
            "back in float32": kept or "nothing but the last layers",
            "verified when loaded": _tolerated(config, table),
            "made by": ", ".join(f"{name} {number}" for name, number in provenance.software.items()),
        },
        {
            f"AP on {val_pictures} validation pictures, percent": [
                f"| precision | {' | '.join(kinds)} |",
                "|---|" + "---|" * len(kinds),
                *rows,
            ]
        },
        command=str(provenance.command),
    )


def _tolerated(config: ModelConfig, table: Int8Table) -> str:
    tolerances = table.tolerances
    masks = f", masks {tolerances.masks:g}" if config.has_masks else ""
    return f"root mean square differences up to: boxes {tolerances.boxes:g} px, scores {tolerances.scores:g}{masks}"


def _parts(table: Int8Table) -> str:
    words = [part.replace("_", " ") for part in table.parts]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
