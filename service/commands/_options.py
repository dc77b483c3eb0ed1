"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = Path("model_store")
StoreOption = Annotated[
    Path,
    typer.Option(
        "--store",
        "--model-store",
        metavar="DIR",
        envvar="ROISERVE_MODEL_STORE",
        help="The model store: a folder that holds <name>/<version>/model.toml.",
    ),
]
