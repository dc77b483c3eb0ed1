"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.settings import Engine, Precision

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
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
EngineOption = Annotated[Engine, typer.Option("--engine", help="What runs the network; auto: the fastest.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option(
        "--precision",
        help="Number format of the network; auto: float16 on CUDA, else int8 for a quantised model, else float32.",
    ),
]
EngineCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--engine-cache-dir",
        metavar="DIR",
        envvar="ROISERVE_ENGINE_CACHE_DIR",
        help="Where engines keep what they compiled, for next time.",
    ),
]
