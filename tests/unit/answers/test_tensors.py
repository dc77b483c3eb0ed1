"""Detections as arrays come back as they were."""

from __future__ import annotations

import numpy as np
import pytest

from service.answers import encode
from service.structures import Detections, Image, Tensors
from service.tensors import read_tensors
from tests.fakes import FAKE_INFO

IMAGE = Image(np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("has_masks", [False, True])
def test_arrays_come_back_with_their_names_types_and_shapes(number: int, has_masks: bool) -> None:
    rng = np.random.default_rng(number)
    detections = Detections(
        boxes=rng.random((number, 4), np.float32),
        labels=np.arange(1, number + 1),
        scores=rng.random(number, np.float32),
        masks=rng.random((number, 28, 28), np.float32) if has_masks else None,
        extras={"embeddings": rng.random((number, 5)), "is_edge": np.zeros(number, np.bool_)},
    )
    arrays = read_tensors(encode(Tensors(), IMAGE, detections, FAKE_INFO))
    expected = detections.arrays()
    assert list(arrays) == list(expected)
    for name, values in expected.items():
        assert arrays[name].dtype == values.dtype
        assert np.array_equal(arrays[name], values)
