"""The service as `roiserve serve` runs it, with a model that finds a hundred blobs in every picture and takes as long
as the environment says: `MILLISECONDS` for each picture, one batch after the other, as on a GPU.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from service.app import create_app
from service.commands._server import serve_app
from service.logs import configure_logging
from service.settings import Settings
from service.structures import Detections, Prediction, Query
from tests.fakes import FakePredictor

MILLISECONDS = "BENCHMARK_MILLISECONDS"
OBJECTS = 100


class TimedPredictor(FakePredictor):
    """See the module."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self._found: dict[tuple[int, int], Detections] = {}

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        end = time.perf_counter() + self._seconds * len(queries)
        found = [self._blobs(query) for query in queries]
        time.sleep(max(0.0, end - time.perf_counter()))
        return [Prediction(one, {}, len(queries)) for one in found]

    def _blobs(self, query: Query) -> Detections:
        height, width = query.image.size
        if (height, width) not in self._found:
            self._found[height, width] = blobs(height, width)
        found = self._found[height, width]
        return found if query.options.with_masks else Detections(found.boxes, found.labels, found.scores)


def blobs(height: int, width: int) -> Detections:
    """Smooth shapes in boxes of a twentieth to two fifths of the picture, the same for every picture of a size."""
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.05, 0.4, (OBJECTS, 2)) * [width, height]
    corners = rng.uniform(0, 1, (OBJECTS, 2)) * ([width, height] - sides)
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    y, x = np.mgrid[-1:1:28j, -1:1:28j]
    stretch = rng.uniform(0.6, 1.3, (OBJECTS, 1, 1))
    distance = stretch * x**2 + y**2 / stretch + 0.2 * np.sin(6 * stretch * x)
    masks = (1 / (1 + np.exp(12 * (distance - 0.8)))).astype(np.float32)
    scores = np.linspace(1, 0.5, OBJECTS, dtype=np.float32)
    return Detections(boxes, np.ones(OBJECTS, np.int64), scores, masks)


def load_timed(settings: Settings) -> Iterator[TimedPredictor]:
    """A factory for worker processes."""
    yield TimedPredictor(float(os.environ[MILLISECONDS]) / 1e3)


if __name__ == "__main__":
    settings = Settings()
    configure_logging(log_format=settings.log_format, log_level=settings.log_level)
    sys.exit(serve_app(create_app(settings, predictor_factory=load_timed)))
