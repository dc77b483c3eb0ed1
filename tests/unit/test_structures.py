"""The nouns check themselves, and what belongs together stays together."""

from __future__ import annotations

import numpy as np
import pytest

from service.structures import Detections


def three() -> Detections:
    return Detections(
        boxes=np.arange(12, dtype=np.float32).reshape(3, 4),
        labels=np.array([1, 2, 3]),
        scores=np.array([0.9, 0.8, 0.7], np.float32),
        masks=np.arange(12, dtype=np.float32).reshape(3, 2, 2),
        extras={"embeddings": np.array([[1.0], [2.0], [3.0]])},
    )


@pytest.mark.parametrize("which", [slice(1, 3), np.array([1, 2])])
def test_all_arrays_of_detections_are_cut_alike(which: slice) -> None:
    some = three()[which]
    assert len(some) == 2
    assert some.labels.tolist() == [2, 3]
    assert some.masks is not None
    assert some.masks[:, 0, 0].tolist() == [4, 8]
    assert some.extras["embeddings"].tolist() == [[2.0], [3.0]]


@pytest.mark.parametrize("extras", [{"embeddings": np.zeros((2, 5))}, {"masks": np.zeros(3)}])
def test_extras_of_another_length_or_a_taken_name_are_refused(extras: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match="length 3, got"):
        Detections(three().boxes, three().labels, three().scores, extras=extras)
