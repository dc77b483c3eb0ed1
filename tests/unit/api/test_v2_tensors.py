"""Tensors of several images are written one after the other, a bounded number of values at a time."""

from __future__ import annotations

import numpy as np
import orjson
import pytest

from service.api import v2_tensors
from service.api.v2_tensors import write_answer
from service.errors import AnswerTooLargeError

MASKS = [np.random.default_rng(n).random((n, 4, 5), np.float32) for n in (3, 0, 2)]
LABELS = [np.array([2, 1, 1]), np.zeros(0, np.int64), np.array([1, 2])]
LIMIT = 10_000


@pytest.mark.parametrize("at_a_time", [7, 20, 1000])
def test_values_of_all_images_are_one_flat_array(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v2_tensors, "_NUMBERS_AT_A_TIME", at_a_time)
    pieces, json_bytes = write_answer(
        {"model_name": "fake"}, [("masks", MASKS, False), ("labels", LABELS, False)], max_json_bytes=LIMIT
    )
    assert json_bytes is None
    assert max(len(piece) for piece in pieces) <= max(200, 24 * at_a_time)
    document = orjson.loads(b"".join(pieces))
    assert document == {
        "model_name": "fake",
        "outputs": [
            {"name": "masks", "datatype": "FP32", "shape": [5, 4, 5], "data": document["outputs"][0]["data"]},
            {"name": "labels", "datatype": "INT64", "shape": [5], "data": [2, 1, 1, 1, 2]},
        ],
    }
    assert np.array_equal(np.array(document["outputs"][0]["data"], np.float32), np.concatenate(MASKS).ravel())


def test_binary_values_follow_the_json() -> None:
    pieces, json_bytes = write_answer({}, [("labels", LABELS, True), ("masks", MASKS, False)], max_json_bytes=LIMIT)
    assert json_bytes is not None
    body = b"".join(pieces)
    assert orjson.loads(body[:json_bytes])["outputs"][0]["parameters"] == {"binary_data_size": 40}
    assert np.frombuffer(body[json_bytes:], np.int64).tolist() == [2, 1, 1, 1, 2]


def test_nothing_found_has_no_values() -> None:
    pieces, _ = write_answer({}, [("masks", [MASKS[1]], False)], max_json_bytes=LIMIT)
    [masks] = orjson.loads(b"".join(pieces))["outputs"]
    assert (masks["shape"], masks["data"]) == ([0, 4, 5], [])


def test_json_that_would_be_too_long_is_refused_and_binary_is_not() -> None:
    with pytest.raises(AnswerTooLargeError, match="more than 100 bytes of JSON; ask for binary data"):
        write_answer({}, [("masks", MASKS, False)], max_json_bytes=100)
    write_answer({}, [("masks", MASKS, True)], max_json_bytes=100)
