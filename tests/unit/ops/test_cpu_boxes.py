"""The CPU's proposals are those that torchvision's RPN chooses from the same outputs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator

from service.modeling.rpn import RegionProposalNetwork

GRIDS = [(16, 24), (8, 12), (4, 6)]
PADDED = (128, 192)
NUM_ANCHORS = 3 * sum(height * width for height, width in GRIDS)


def network(*, before: int, after: int = 60, score_thresh: float = 0.0) -> RegionProposalNetwork:
    anchors = AnchorGenerator(((16,), (32,), (64,)), ((0.5, 1.0, 2.0),) * 3)
    counts = {"training": 1, "testing": before}, {"training": 1, "testing": after}
    return RegionProposalNetwork(
        anchors, None, 0.7, 0.3, 256, 0.5, *counts, nms_thresh=0.6, score_thresh=score_thresh
    ).eval()


def outputs(images: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, NUM_ANCHORS, generator=numbers) * 3
    return logits, torch.randn(images, NUM_ANCHORS, 4, generator=numbers) * 0.3


def chosen(
    network: RegionProposalNetwork, logits: Tensor, deltas: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    return network.propose(logits, deltas, padded_size=PADDED, grid_sizes=GRIDS, image_sizes=sizes)


def torchvisions(
    network: RegionProposalNetwork, logits: Tensor, deltas: Tensor, sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    anchors = network.lay_anchors(PADDED, GRIDS, logits.device)
    boxes = network.box_coder.decode(deltas.flatten(end_dim=1), [anchors] * len(logits))
    found: list[Tensor]
    found, _ = rpn.RegionProposalNetwork.filter_proposals(
        network,
        boxes.reshape(len(logits), -1, 4),
        logits.reshape(-1, 1),
        list(sizes),
        [3 * height * width for height, width in GRIDS],
    )
    return found


@pytest.mark.parametrize("before", [40, 100, 10_000], ids=["few", "all of a level", "more than are moved apart"])
@pytest.mark.parametrize("score_thresh", [0.0, 0.6])
def test_the_same_proposals_as_torchvision(before: int, score_thresh: float) -> None:
    given = network(before=before, score_thresh=score_thresh)
    sizes = [(128, 192), (100, 150), (64, 192)]
    logits, deltas = outputs(3)
    with torch.inference_mode():
        for ours, expected in zip(
            chosen(given, logits, deltas, sizes), torchvisions(given, logits, deltas, sizes), strict=True
        ):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_of_equal_logits_the_first_anchors_are_chosen() -> None:
    logits, deltas = torch.zeros(1, NUM_ANCHORS), torch.zeros(1, NUM_ANCHORS, 4)
    given = network(before=5)
    [boxes] = chosen(given, logits, deltas, [PADDED])
    anchors = given.lay_anchors(PADDED, GRIDS, logits.device)
    starts = [0, 3 * 16 * 24, 3 * (16 * 24 + 8 * 12)]
    candidates = torch.cat([anchors[start : start + 5] for start in starts]).clamp(min=0)
    rows = [int((candidates == box).all(dim=1).nonzero()[0]) for box in boxes]
    assert rows == sorted(rows)
    assert {row // 5 for row in rows} == {0, 1, 2}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_yield_no_proposal(value: float) -> None:
    logits, deltas = outputs(1)
    given = network(before=10_000, after=10_000)
    logits[0, ::2] = -math.inf if value == -math.inf else math.nan
    deltas[0, 1::2, 2] = value if math.isnan(value) else 0
    [boxes] = chosen(given, logits, deltas, [PADDED])
    assert boxes.isfinite().all()
    if math.isnan(value):
        assert len(boxes) == 0


def test_a_batch_gives_each_image_what_it_gets_alone() -> None:
    given = network(before=200)
    logits, deltas = outputs(4)
    sizes = [(128, 192), (90, 190), (128, 100), (64, 64)]
    together = chosen(given, logits, deltas, sizes)
    for index, size in enumerate(sizes):
        [alone] = chosen(given, logits[index : index + 1], deltas[index : index + 1], [size])
        torch.testing.assert_close(alone, together[index], rtol=0, atol=0)
