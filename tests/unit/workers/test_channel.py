"""What processes say to each other arrives whole and means the same."""

from __future__ import annotations

import socket
import threading

import orjson
import pytest

from service.errors import DeadlineExceededError, InferenceError, OverloadedError, ServiceError
from service.structures import DetectOptions
from service.workers.channel import (
    BlockingChannel,
    FrameReader,
    error_from,
    error_to,
    options_from,
    options_to,
    pack,
)


def through_json(header: dict[str, object]) -> dict[str, object]:
    parsed: dict[str, object] = orjson.loads(orjson.dumps(header))
    return parsed


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_frames_are_found_however_the_stream_is_cut(piece: int) -> None:
    frames = [({"id": 1}, b""), ({"id": 2}, b"\x00" * 3000), ({"id": 3}, b"end")]
    stream = b"".join(part for header, body in frames for part in pack(header, body))
    reader = FrameReader()
    found = [one for at in range(0, len(stream), piece) for one in reader.feed(stream[at : at + piece])]
    assert found == frames


def test_frames_of_many_threads_do_not_mix() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = BlockingChannel(theirs)
        bodies = [bytes([index]) * 2_000_000 for index in range(4)]
        threads = [
            threading.Thread(target=channel.send, args=({"id": index}, body)) for index, body in enumerate(bodies)
        ]
        for thread in threads:
            thread.start()
        frames = BlockingChannel(ours).frames()
        found = {header["id"]: body for header, body in (next(frames) for _ in bodies)}
        assert found == dict(enumerate(bodies))


@pytest.mark.parametrize(
    "options",
    [
        DetectOptions(),
        DetectOptions(
            score_thresh=0.1, label_ids=frozenset({3, 1}), proposals=((0.1, 0.2, 1e9, 3.0),), roi_op="roi_pool"
        ),
        DetectOptions(label_ids=frozenset(), proposals=(), with_masks=False),
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
