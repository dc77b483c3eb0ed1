"""What the other servers of `benchmarks.peers` answer with; their processes import it by name."""

from __future__ import annotations

import functools
import os

from starlette.responses import Response

from benchmarks._answers import StraightforwardService
from benchmarks._detectors import BUNDLED, torchvision_twin
from service.model_store.store import ModelStore


@functools.cache
def service() -> StraightforwardService:
    """The model of this process, and what makes answers of it."""
    stored = ModelStore(BUNDLED).find(os.environ["MODEL"])
    return StraightforwardService(torchvision_twin(stored), stored.model_toml.labels)


def as_json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
