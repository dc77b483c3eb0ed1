"""One suppression for a whole batch answers as torchvision's does image by image, order and ties included."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from service.devices.cpu import CpuDevice
from service.ops import nms
from service.ops.nms import Kept, best_of_each_image, rounded_down

CLASSES = 3


def some_boxes(count: int, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes that overlap a good deal, scores with ties, classes."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 200
    boxes = torch.cat([corners, corners + 20 + torch.rand(count, 2, generator=generator) * 60], dim=1)
    scores = (torch.rand(count, generator=generator) * 50).round() / 50
    return boxes, scores, torch.randint(0, CLASSES, (count,), generator=generator)


def suppress(
    images: list[tuple[Tensor, Tensor, Tensor]], *, limit: int = 10_000, valid: Tensor | None = None
) -> list[Tensor]:
    return kept_of(images, valid=valid).up_to([limit] * len(images))


def kept_of(
    images: list[tuple[Tensor, Tensor, Tensor]], *, valid: Tensor | None = None, iou_thresh: float | Tensor = 0.5
) -> Kept:
    boxes, scores, classes = (torch.cat(parts) for parts in zip(*images, strict=True))
    return best_of_each_image(
        boxes,
        scores,
        images=torch.cat([torch.full((len(one[0]),), index) for index, one in enumerate(images)]),
        classes=classes,
        valid=torch.ones(len(boxes), dtype=torch.bool) if valid is None else valid,
        num_images=len(images),
        num_classes=CLASSES,
        iou_thresh=iou_thresh,
        largest_group=len(boxes),
    )


# torchvision has one way for up to 1000 boxes and another for more, and they differ in the last digits.
@pytest.mark.parametrize("counts", [(1,), (1000, 1001), (3, 0, 1500, 40)])
def test_every_image_gets_torchvisions_own_answer_in_its_order(counts: tuple[int, ...]) -> None:
    images = [some_boxes(count, seed=seed) for seed, count in enumerate(counts)]
    starts = [sum(counts[:index]) for index in range(len(counts))]
    for kept, start, one in zip(suppress(images), starts, images, strict=True):
        expected = batched_nms(*one, 0.5)
        if len(one[0]) > 1000:  # there it sorts without minding the order of equal scores
            expected = expected.sort().values
            expected = expected[one[1][expected].sort(stable=True, descending=True).indices]
        torch.testing.assert_close(kept - start, expected, rtol=0, atol=0)


def test_what_is_not_valid_suppresses_nothing_and_is_not_kept() -> None:
    boxes, scores, classes = some_boxes(500, seed=7)
    valid = torch.arange(500) % 3 > 0
    (kept,) = suppress([(boxes, scores, classes)], valid=valid)
    rows = valid.nonzero().squeeze(1)
    torch.testing.assert_close(kept, rows[batched_nms(boxes[rows], scores[rows], classes[rows], 0.5)], rtol=0, atol=0)


def test_each_image_keeps_its_best_up_to_the_limit() -> None:
    images = [some_boxes(200, seed=seed) for seed in range(2)]
    for few, all_of_them in zip(suppress(images, limit=5), suppress(images), strict=True):
        assert len(all_of_them) > 5
        torch.testing.assert_close(few, all_of_them[:5], rtol=0, atol=0)


@pytest.mark.parametrize("count", [5, 400])
def test_a_table_of_fixed_size_holds_the_same_boxes(count: int) -> None:
    kept = kept_of([some_boxes(200, seed=seed) for seed in range(2)])
    indices, exist = kept.table(count)
    assert indices.shape == exist.shape == (2, count)
    for row, is_there, expected in zip(indices, exist, kept.up_to([count] * 2), strict=True):
        torch.testing.assert_close(row[is_there], expected, rtol=0, atol=0)


def test_no_boxes_at_all() -> None:
    nothing = some_boxes(0, seed=0)
    assert [len(one) for one in suppress([nothing, nothing])] == [0, 0]


def test_every_image_may_have_a_threshold_of_its_own() -> None:
    images = [some_boxes(200, seed=seed) for seed in range(3)]
    threshs = [0.2, 0.5, 0.9]
    kept = kept_of(images, iou_thresh=torch.from_numpy(rounded_down(threshs))).up_to([1000] * 3)
    for index, (one, thresh) in enumerate(zip(images, threshs, strict=True)):
        torch.testing.assert_close(kept[index] - 200 * index, batched_nms(*one, thresh), rtol=0, atol=0)


def test_thresholds_are_rounded_so_that_the_same_float32_exceed_them() -> None:
    for thresh in (0.1, 0.3, 0.5, 0.7, 1 / 3, 0.999999999):
        (rounded,) = torch.from_numpy(rounded_down([thresh]))
        neighbours = [rounded, torch.nextafter(rounded, torch.tensor(2.0)), torch.nextafter(rounded, torch.tensor(0.0))]
        for one in neighbours:
            assert (one > rounded) == (one.double() > thresh)


THRESHS = [0.5, 0.5, 0.3]


def given_to_the_kernels() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    boxes, _, _ = some_boxes(300, seed=3)
    boxes[280] = torch.nan
    starts = torch.tensor([0, 100, 100, 250])  # the last 50 belong to no group
    groups = torch.bucketize(torch.arange(300), starts[1:], right=True)
    return boxes, groups, starts, torch.from_numpy(rounded_down(THRESHS))


def test_the_way_for_cuda_without_triton_keeps_the_same_boxes() -> None:
    """Run on the CPU: what it does there is the same."""
    given = given_to_the_kernels()
    expected = nms._suppress_by_numba(*given, largest=150)
    assert 0 < int(expected.sum()) < 250
    torch.testing.assert_close(nms._suppress_by_torchvision(*given, largest=150), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kernel", ["missing", "failing", "wrong"])
def test_if_tritons_kernels_do_not_work_torchvisions_takes_their_place(
    kernel: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def suppress(boxes: Tensor, *args: Tensor, largest: int, most_bytes: int = 0) -> Tensor:
        if kernel == "failing":
            raise RuntimeError("no kernel image is available")
        return torch.ones(len(boxes), dtype=torch.bool)

    module = None if kernel == "missing" else SimpleNamespace(suppress=suppress)
    monkeypatch.setitem(sys.modules, "service.ops._cuda_suppression", module)
    monkeypatch.setattr(CpuDevice, "kernels", "triton")
    nms._triton_suppresses_alike.cache_clear()
    given = given_to_the_kernels()
    for _ in range(2):
        kept = nms._suppress(*given, largest=150)
        torch.testing.assert_close(kept, nms._suppress_by_numba(*given, largest=150), rtol=0, atol=0)
    assert caplog.text.count("torchvision's") == 1  # not a line for each batch
    nms._triton_suppresses_alike.cache_clear()
