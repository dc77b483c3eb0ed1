"""Factories for worker processes in which something is wrong, on purpose: each does its harm in the worker that calls
it, and then loads the fake models.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

from service import pipeline
from service.answers.json import JsonEncoder
from service.devices.cpu import CpuDevice
from service.errors import InvalidRequestError, ModelStoreError
from service.imaging import decode
from service.imaging.decode import decode_image
from service.settings import Settings
from service.structures import Image
from service.workers import local, process
from tests.fakes import FakePredictor, load_fakes

# A picture whose top left pixel has this red value makes a stage fail, if a factory says so.
FATAL = 21
# What follows the end of a picture that is fatal before its pixels are known.
DEADLY_TAIL = b"DEADLY"
# A model of this name is loaded when there is a file `go` in the folder of the model store, and one of that name never.
GATED, ENDLESS = "gated", "endless"


def die() -> None:
    """As by a fault in native code."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """For ever."""
    threading.Event().wait()


class Lost(CpuDevice):
    """A device with which something happens as soon as it is asked how it is."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__("cpu")
        self._happens = happens

    def probe(self) -> None:
        self._happens()


class OnGpus:
    """Pretends GPUs, from when it arrives in the worker; a worker on one of them may die as soon as it loads models, or
    say that it cannot.
    """

    def __init__(self, gpus: int, *, dead: str | None = None, refusing: str | None = None) -> None:
        self.gpus = gpus
        self.dead = dead
        self.refusing = refusing

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        vars(process).update(count_gpus=lambda: self.gpus)
        vars(local).update(device_named=CpuDevice)  # by the GPU's name

    def __call__(self, settings: Settings) -> Iterator[FakePredictor]:
        if settings.device == self.dead:
            die()
        if self.refusing is not None and settings.device.startswith(self.refusing):
            raise ModelStoreError(f"no kernel image for {settings.device}")
        return load_fakes(settings)


def die_while_starting(settings: Settings) -> Iterator[FakePredictor]:
    """A worker that dies before it has any models, while there is a file `die` in the folder of the model store."""
    if (settings.model_store / "die").exists():
        die()
    return load_fakes(settings)


def die_when_asked(settings: Settings) -> Iterator[FakePredictor]:
    """A worker that dies at its first probe, right after it was ready."""
    vars(local).update(device_named=lambda label: Lost(die))
    return load_fakes(settings)


def hang_when_asked(settings: Settings) -> Iterator[FakePredictor]:
    """A worker that never answers a probe."""
    vars(local).update(device_named=lambda label: Lost(hang))
    return load_fakes(settings)


def die_in_decode(settings: Settings) -> Iterator[FakePredictor]:
    """A worker whose decoder dies of fatal pictures."""
    _harm_decoder(die)
    return load_fakes(settings)


def die_in_header(settings: Settings) -> Iterator[FakePredictor]:
    """A worker that dies of pictures with a deadly tail while it reads their headers."""
    read = vars(decode)["read_container"]

    def read_or_die(data: bytes, *args: Any) -> Any:
        if data.endswith(DEADLY_TAIL):
            die()
        return read(data, *args)

    vars(decode).update(read_container=read_or_die)
    return load_fakes(settings)


def hang_in_decode(settings: Settings) -> Iterator[FakePredictor]:
    """A worker whose decoder never comes to an end with fatal pictures."""
    _harm_decoder(hang)
    return load_fakes(settings)


def die_in_encode(settings: Settings) -> Iterator[FakePredictor]:
    """A worker whose encoder dies of what was found in fatal pictures."""
    encode = JsonEncoder.encode

    def encode_or_die(encoder: JsonEncoder, image: Image, *args: Any, **options: Any) -> Iterator[bytes]:
        if image.pixels[0, 0, 0] == FATAL:
            die()
        return encode(encoder, image, *args, **options)

    patch.object(JsonEncoder, "encode", encode_or_die).start()
    return load_fakes(settings)


def _harm_decoder(harm: Callable[[], None]) -> None:

    def decode_with_harm(data: bytes, **options: Any) -> Image:
        # Without what stops a decoding whose caller has gone, so that the harm comes all the same.
        if decode_image(data, limits=options["limits"]).pixels[0, 0, 0] == FATAL:
            harm()
        return decode_image(data, **options)

    vars(pipeline).update(decode_image=decode_with_harm)


class Unspeakable(FakePredictor):
    """Cannot say what it found, nor what went wrong."""

    def group_key(self, image_size: tuple[int, int]) -> tuple[int, int]:
        error = InvalidRequestError("the cause cannot be put into words")
        vars(error)["cause"] = object()
        raise error


def load_unspeakable(settings: Settings) -> Iterator[FakePredictor]:
    """One model whose errors no frame can hold."""
    yield Unspeakable()


def load_from_folder(settings: Settings) -> Iterator[FakePredictor]:
    """Fake models, as long as there is the folder of the model store."""
    if not settings.model_store.exists():
        raise ModelStoreError("there is no model store")
    return load_fakes(settings)


def load_gated(settings: Settings) -> Iterator[FakePredictor]:
    """Fake models that may be long in coming."""
    names = {reference.partition("@")[0] for reference in settings.models}
    if ENDLESS in names:
        hang()
    while GATED in names and not (settings.model_store / "go").exists():
        time.sleep(0.01)
    return load_fakes(settings)
