"""What processes say to each other arrives whole and means the same."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import orjson
import pytest

from service.errors import DeadlineExceededError, InferenceError, OverloadedError, ServiceError
from service.structures import (
    NOT_FINITE,
    Coco,
    Cvat,
    DetectOptions,
    Drawing,
    Encoded,
    Form,
    HuggingFace,
    Json,
    LabelStudio,
    LabelStudioTag,
    Pixels,
    Roboflow,
    Tensors,
    Verification,
    VerifiedValue,
)
from service.workers.channel import (
    BlockingChannel,
    FrameReader,
    error_from,
    error_to,
    form_from,
    form_to,
    model_info_from,
    options_from,
    options_to,
    pack,
    source_from,
    source_to,
)
from tests.fakes import FAKE_INFO


def through_json(header: dict[str, object]) -> dict[str, object]:
    parsed: dict[str, object] = orjson.loads(orjson.dumps(header))
    return parsed


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_frames_are_found_however_the_stream_is_cut(piece: int) -> None:
    frames = [({"id": 1}, b""), ({"id": 2}, b"\x00" * 3000), ({"id": 3}, b"end")]
    stream = b"".join(part for header, body in frames for part in pack(header, body))
    reader = FrameReader()
    found = [one for at in range(0, len(stream), piece) for one in reader.feed(stream[at : at + piece])]
    assert [(header, b"".join(pieces)) for header, pieces in found] == frames


def test_frames_of_many_threads_do_not_mix() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = BlockingChannel(theirs, later=lambda flush: None)
        bodies = [bytes([index]) * 2_000_000 for index in range(4)]
        threads = [
            threading.Thread(target=channel.send, args=({"id": index}, body)) for index, body in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        frames = BlockingChannel(ours, later=lambda flush: None).frames()
        found = {header["id"]: body for header, body in (next(frames) for _ in bodies)}
        assert found == dict(enumerate(bodies))


def test_delayed_frames_go_with_the_next_one_or_later_but_in_order() -> None:
    flushes: list[Callable[[], None]] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        channel = BlockingChannel(theirs, later=flushes.append)
        channel.send_soon({"id": 1})
        channel.send_soon({"id": 2})
        with pytest.raises(BlockingIOError):
            ours.recv(1)
        assert len(flushes) == 1
        channel.send({"id": 3}, b"body")
        channel.send_soon({"id": 4})
        assert len(flushes) == 1  # which has not come yet
        received = [(header["id"], b"".join(pieces)) for header, pieces in FrameReader().feed(ours.recv(1000))]
        assert received == [(1, b""), (2, b""), (3, b"body")]
        flushes.pop()()
        assert [header["id"] for header, _ in FrameReader().feed(ours.recv(1000))] == [4]
        channel.send_soon({"id": 5})
        assert len(flushes) == 1


@pytest.mark.parametrize(
    "options",
    [
        DetectOptions(),
        DetectOptions(
            score_thresh=0.1, label_ids=frozenset({3, 1}), proposals=((0.1, 0.2, 1e9, 3.0),), roi_op="roi_pool"
        ),
        DetectOptions(label_ids=frozenset(), proposals=(), with_masks=False, extras=("class_scores",)),
    ],
)
def test_options_mean_the_same_on_the_other_side(options: DetectOptions) -> None:
    assert options_from(through_json(options_to(options))) == options


@pytest.mark.parametrize(
    "error",
    [
        OverloadedError("full", retry_after_seconds=2.5),
        DeadlineExceededError("too late", stage="queue"),
        InferenceError("failed"),
        ServiceError("?"),
    ],
)
def test_error_is_the_same_on_the_other_side(error: ServiceError) -> None:
    again = error_from(through_json(error_to(error)))
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_strange_error_becomes_one_of_the_service_with_its_traceback() -> None:
    again = error_from(through_json(error_to(ZeroDivisionError("by zero"))))
    assert type(again) is ServiceError
    assert "ZeroDivisionError" in str(again.__cause__)


@pytest.mark.parametrize(
    "form",
    [
        Json("rle"),
        Json(),
        Drawing("image/jpeg"),
        Tensors(),
        Coco("a.png", True),
        Coco(139),
        Roboflow("points"),
        HuggingFace(with_masks=True),
        Cvat(),
        LabelStudio("a@1", (LabelStudioTag("brushlabels", "brush", "image", ("Cat", None), 0.5),)),
    ],
)
def test_forms_come_back_as_they_were(form: Form) -> None:
    assert form_from(through_json(form_to(form))) == form


@pytest.mark.parametrize("shape", [(2, 3, 3), (0, 3, 3)])
def test_sources_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    header, body = source_to(Encoded(b"a file", "stretch"))
    encoded = source_from(through_json(header), body)
    assert isinstance(encoded, Encoded)
    assert (encoded.data, encoded.intensity) == (b"a file", "stretch")
    array = np.arange(math.prod(shape), dtype=np.uint8).reshape(shape)
    header, body = source_to(Pixels(array))
    pixels = source_from(through_json(header), body)
    assert isinstance(pixels, Pixels)
    assert pixels.array.flags.writeable  # otherwise PyTorch warns, in the log
    assert np.array_equal(pixels.array, array)


def test_model_arrives_with_its_verification() -> None:
    values = {"boxes": VerifiedValue(0.002, 0.01), "scores": VerifiedValue(NOT_FINITE, 0.001)}
    verified = replace(FAKE_INFO, verification=Verification("compiled", "float16", values, 0.5))
    for info in (FAKE_INFO, verified):
        assert model_info_from(through_json(asdict(info))) == info
    assert verified.verification is not None
    assert not verified.verification.has_passed
