"""What every operator of the room promises about its arguments."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from service import ops
from service.ops.rois import as_rois
from tests.unit.ops.cases import GRID, INF, NAN, box, random_features, random_rois

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "roi_pool": ops.roi_pool,
    "roi_align": ops.roi_align,
    "roi_align aligned": partial(ops.roi_align, aligned=True),
    "roi_align_max": ops.roi_align_max,
    "roi_align_max aligned": partial(ops.roi_align_max, aligned=True),
    "roi_align_max sampling_ratio=2": partial(ops.roi_align_max, sampling_ratio=2),
    "roi_warp": ops.roi_warp,
    "spp": ops.spp,
    "crop": partial(ops.crop, padding=0),
}
every_operator = pytest.mark.parametrize("op", OPERATORS.values(), ids=OPERATORS.keys())


@every_operator
@pytest.mark.parametrize("wrong", [NAN, INF, -INF, 1e30], ids=str)
def test_boxes_that_are_nowhere_are_refused(op: Callable[..., Tensor], wrong: float) -> None:
    with pytest.raises(ValueError, match=r"box coordinates that are finite .* got a box at \[0.0, 0.0, "):
        op(GRID, box(0, 0, wrong, 3), 2)


@every_operator
@pytest.mark.parametrize("index", [-1, 1, NAN], ids=str)
def test_box_of_an_image_that_does_not_exist_is_refused(op: Callable[..., Tensor], index: float) -> None:
    with pytest.raises(ValueError, match="image indices from 0 to 0"):
        op(GRID, torch.tensor([[index, 0, 0, 1, 1]]), 2)


@every_operator
@pytest.mark.parametrize(
    "boxes", [torch.zeros(3, 4), torch.zeros(5), [torch.zeros(3, 5)], [torch.zeros(1, 4)] * 2, [torch.zeros(0)]]
)
def test_boxes_of_another_shape_are_refused(op: Callable[..., Tensor], boxes: Tensor | list[Tensor]) -> None:
    with pytest.raises(ValueError, match="expected boxes"):
        op(GRID, boxes, 2)


@every_operator
@pytest.mark.parametrize("size", [0, -1, (2, 0), ()], ids=str)
def test_output_size_that_holds_nothing_is_refused(op: Callable[..., Tensor], size: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected"):
        op(GRID, box(0, 0, 1, 1), size)


@pytest.mark.parametrize("size", [(1, 2, 3), ()], ids=str)
def test_output_size_is_one_number_or_two(size: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {size}")):
        ops.roi_pool(GRID, box(0, 0, 1, 1), size)


@every_operator
@pytest.mark.parametrize(
    "input", [GRID[0], GRID.int(), torch.zeros(1, 0, 5, 5), torch.zeros(1, 1, 0, 5), torch.zeros(1, 1, 5, 0)]
)
def test_features_without_cells_or_of_integers_are_refused(op: Callable[..., Tensor], input: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a floating \(N, C, H, W\) input"):
        op(input, box(0, 0, 1, 1), 2)


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
def test_scale_that_is_no_scale_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match="spatial_scale above 0"):
        as_rois(box(0, 0, 1, 1), GRID, scale)


@every_operator
def test_no_boxes_give_an_empty_answer_and_no_gradient(op: Callable[..., Tensor]) -> None:
    features = random_features().requires_grad_()
    for boxes in ([], [torch.zeros(0, 4)] * 2, torch.zeros(0, 5)):
        pooled = op(features, boxes, 3)
        assert pooled.shape[:2] == (0, 3)
        assert pooled.shape[2:] == op(features, random_rois(1, extent=6), 3).shape[2:]
        (gradient,) = torch.autograd.grad(pooled.sum(), features)
        assert not gradient.any()


@every_operator
def test_no_images_and_no_boxes_give_an_empty_answer(op: Callable[..., Tensor]) -> None:
    assert len(op(torch.zeros(0, 3, 5, 5), [], 2)) == 0


@every_operator
def test_list_and_table_of_boxes_mean_the_same(op: Callable[..., Tensor]) -> None:
    first, second = random_rois(3, extent=24)[:, 1:], random_rois(2, extent=24, seed=1)[:, 1:]
    table = torch.cat([torch.cat([torch.zeros(3, 1), torch.ones(2, 1)]), torch.cat([first, second])], dim=1)
    features = random_features()
    assert torch.equal(op(features, [first, second], 2, 0.25), op(features, table, 2, 0.25))


@every_operator
def test_box_does_not_depend_on_its_neighbours(op: Callable[..., Tensor]) -> None:
    features, rois = random_features(), random_rois(8, extent=24)
    alone = torch.cat([op(features, roi.unsqueeze(0), (3, 2) if op is not ops.spp else 3, 0.25) for roi in rois])
    assert torch.equal(op(features, rois, (3, 2) if op is not ops.spp else 3, 0.25), alone)


@every_operator
def test_box_outside_the_map_is_zero(op: Callable[..., Tensor]) -> None:
    outside = torch.cat([*box(-90, -90, -80, -80), *box(80, 80, 90, 90), *box(1, -90, 4, -80), *box(80, 1, 90, 4)])
    assert not op(GRID + 1, [outside], 2).any()


@every_operator
def test_empty_and_inside_out_boxes_are_finite_and_take_no_harm(op: Callable[..., Tensor]) -> None:
    features = random_features().requires_grad_()
    odd = torch.cat([*box(2, 2, 2, 2), *box(1, 3, 4, 3), *box(4, 4, 1, 1), *box(5, 1, 1, 4), *box(0, 0, 0, 0)])
    pooled = op(features, [odd, odd], 2)
    (gradient,) = torch.autograd.grad(pooled.sum(), features)
    assert pooled.isfinite().all()
    assert gradient.isfinite().all()


@every_operator
def test_inside_out_box_is_an_empty_one(op: Callable[..., Tensor]) -> None:
    assert torch.equal(op(GRID, box(3, 3, 1, 1), 2), op(GRID, box(3, 3, 3, 3), 2))
    assert torch.equal(op(GRID, box(3, 1, 1, 3), 2), op(GRID, box(3, 1, 3, 3), 2))


@pytest.mark.parametrize(
    "op",
    [
        ops.roi_pool,
        partial(ops.roi_align, sampling_ratio=2),
        partial(ops.roi_align_max, sampling_ratio=2),
        ops.roi_warp,
        ops.spp,
        ops.crop,
    ],
)
def test_huge_boxes_are_finite_and_quick(op: Callable[..., Tensor]) -> None:
    """The last sampling points or bins are millions of cells away; nobody walks there."""
    pooled = op(GRID, box(-4e6, -4e6, 4e6, 4e6), 40)
    assert pooled.isfinite().all()


@pytest.mark.parametrize(
    ("op", "middle"),
    [
        (ops.roi_pool, 24),  # the largest cell of the whole grid
        (lambda features, boxes, size: ops.spp(features, boxes, (size,)), 24),
        (partial(ops.roi_align, sampling_ratio=1), 7),  # the point (2, 1): 5 * 1 + 2
        (partial(ops.roi_align_max, sampling_ratio=1), 7),
        (ops.roi_warp, 7),
        (partial(ops.crop, padding=0), 4),  # the same point, half a pixel up and left of the pixel's middle
    ],
)
def test_a_huge_box_reads_in_its_middle_what_is_there_and_elsewhere_nothing(
    op: Callable[..., Tensor], middle: float
) -> None:
    pooled = op(GRID, box(2 - 4e6, 1 - 4e6, 2 + 4e6, 1 + 4e6), 3).reshape(3, 3)
    expected = torch.zeros_like(pooled)
    expected[1, 1] = middle
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("op", [ops.roi_align, ops.roi_align_max])
def test_adaptive_sampling_refuses_boxes_that_would_take_for_ever(op: Callable[..., Tensor]) -> None:
    assert op(GRID, box(-8, -8, 12, 12), 2).isfinite().all()
    with pytest.raises(ValueError, match=r"up to 20 cells .* got 21; clip them to the image, or set sampling_ratio"):
        op(GRID, box(0, 0, 1, 21), 2)


@every_operator
@pytest.mark.parametrize(("dtype", "relative_error"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_precision_is_rounded_once_at_the_end(
    op: Callable[..., Tensor], dtype: torch.dtype, relative_error: float
) -> None:
    """Half a unit in the last place, and what float32 itself is off (1e-5 here, where values are about 1)."""
    features, rois = random_features().to(dtype), random_rois(8, extent=24)
    pooled = op(features, rois, 3, 0.25)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled.double(), op(features.double(), rois, 3, 0.25), rtol=relative_error, atol=1e-5)


@every_operator
def test_float32_features_take_boxes_of_any_type(op: Callable[..., Tensor]) -> None:
    features, rois = random_features().float(), torch.tensor([[0, 4, 4, 16, 20], [1, 0, 8, 24, 12]])
    expected = op(features, rois.float(), 2, 0.25)
    assert expected.dtype == torch.float32
    assert torch.equal(op(features, rois, 2, 0.25), expected)
    assert torch.equal(op(features, rois.double(), 2, 0.25), expected)
