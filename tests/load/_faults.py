"""Faults on purpose, in a worker: pictures that kill it, and a device with little memory. `python -m tests.load._faults
kill|memory|header` is `roiserve serve` with one of them, with its settings from the environment.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import PIL.Image

from service.app import create_app
from service.commands._server import serve_app
from service.errors import OutOfMemoryError
from service.imaging import decode
from service.logs import configure_logging
from service.pipeline import Predictor
from service.settings import Settings
from service.structures import Image, ModelInfo, Prediction, Query
from service.workers.detector import PredictorFactory
from service.workers.stored import stored_predictors

KILLER_COLOUR = (13, 77, 211)
# What a picture ends with that is fatal before its pixels are known.
DEADLY_TAIL = b"DEADLY"
# More pictures at once are too much for the device.
MOST_PICTURES = 2

Fault = Callable[[Sequence[Query]], None]


def killer_picture() -> bytes:
    """A picture that kills the worker whose device takes it."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 48), KILLER_COLOUR).save(buffer, "PNG")
    return buffer.getvalue()


def deadly_header(number: int) -> bytes:
    """A picture that kills the worker that reads its header, another one for each number."""
    return killer_picture() + number.to_bytes(4, "big") + DEADLY_TAIL


def die_of_killer_pictures(queries: Sequence[Query]) -> None:
    """As by a fault in native code, or by the kernel for lack of memory."""
    if any(tuple(query.image.pixels[0, 0]) == KILLER_COLOUR for query in queries):
        os.kill(os.getpid(), signal.SIGKILL)


def lack_memory(queries: Sequence[Query]) -> None:
    """As a GPU that is too small."""
    if len(queries) > MOST_PICTURES:
        raise OutOfMemoryError(f"not enough memory for a batch of {len(queries)}, injected")


class FaultyPredictor:
    """A real predictor to which something happens first."""

    def __init__(self, predictor: Predictor, fault: Fault) -> None:
        self._predictor = predictor
        self._fault = fault

    @property
    def info(self) -> ModelInfo:
        return self._predictor.info

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return self._predictor.group_key(image_size)

    def begin_upload(self, image: Image) -> Image:
        return image

    def warm_up(self) -> None:
        self._predictor.warm_up()

    def release_memory(self) -> None:
        self._predictor.release_memory()

    def predict(self, queries: Sequence[Query]) -> Sequence[Prediction]:
        self._fault(queries)
        return self._predictor.predict(queries)


def faulty_predictors(settings: Settings, *, fault: Fault) -> Iterator[FaultyPredictor]:
    """The models of the store, in a worker process."""
    for predictor in stored_predictors(settings):
        yield FaultyPredictor(predictor, fault)


def predictors_with_deadly_headers(settings: Settings) -> Iterator[Predictor]:
    """The models of the store, in a worker process that dies of some headers."""
    read = vars(decode)["read_container"]

    def read_or_die(data: bytes, *args: Any) -> Any:
        if data.endswith(DEADLY_TAIL):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(data, *args)

    vars(decode).update(read_container=read_or_die)
    return stored_predictors(settings)


def main(factory: PredictorFactory) -> int:
    settings = Settings()
    configure_logging(log_format=settings.log_format, log_level=settings.log_level)
    return serve_app(create_app(settings, predictor_factory=factory))


if __name__ == "__main__":
    # By way of the module's real name, for the workers unpickle the functions by it.
    from tests.load import _faults

    factories: dict[str, PredictorFactory] = {
        "kill": partial(_faults.faulty_predictors, fault=_faults.die_of_killer_pictures),
        "memory": partial(_faults.faulty_predictors, fault=_faults.lack_memory),
        "header": _faults.predictors_with_deadly_headers,
    }
    sys.exit(_faults.main(factories[sys.argv[1]]))
