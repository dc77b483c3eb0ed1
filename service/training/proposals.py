"""Proposals for training networks that have no RPN: selective search runs once per picture, and the result is cached on
disk.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from service.modeling.config import ProposalsConfig
from service.modeling.proposals import selective_search
from service.structures import Float32Array
from service.training.dataset import Sample


class ProposalCache:
    """Selective search's proposals of a data set's pictures.

    Args:
        folder: where they are cached, in a subfolder named after the search settings.
        config: how to search.
    """

    def __init__(self, folder: Path, config: ProposalsConfig) -> None:
        self._folder = folder / f"proposals-{config.mode}-{config.search_width}-{config.max_count}"
        self._config = config

    def of(self, sample: Sample) -> Float32Array:
        """(L, 4) in pixels of the stored image. Thread-safe."""
        path = self._folder / f"{sample.image_id}.npy"
        if path.exists():
            kept: Float32Array = np.load(path)
            return kept
        found = selective_search(sample.read_pixels(), self._config)
        self._folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.stem}-{threading.get_ident()}.tmp.npy")
        np.save(temporary, found)
        temporary.replace(path)
        return found
