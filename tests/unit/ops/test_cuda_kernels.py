"""The Triton kernels answer as the CPU's do. No GPU is needed: Triton interprets them, and compiles them for one.

Each in a process of its own, for whether a kernel is interpreted is settled when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SUPPRESSED_ALIKE = """
import numpy as np
import torch
from hypothesis import given, settings, strategies as st
from service.ops import _cuda_suppression, nms

_cuda_suppression._ROWS_AT_ONCE = 64  # so that there are several turns

@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from([0, 1, 20, 63, 64, 65, 100]), min_size=1, max_size=4),
    st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), min_size=4, max_size=4),
    st.sampled_from([0, 1, 30]),
    st.booleans(),
    st.integers(0, 99),
)
def alike(sizes, threshs, of_no_group, is_stored, seed):
    starts = torch.tensor([0, *np.cumsum(sizes)])
    count, numbers = int(starts[-1]) + of_no_group, np.random.default_rng(seed)
    if not count:
        return
    corners = numbers.integers(0, 60, (count, 2))  # whole numbers, so that overlaps are equal to the thresholds
    boxes = torch.from_numpy(np.hstack([corners, corners + numbers.integers(0, 40, (count, 2))])).float()
    for value in (float("nan"), float("inf"), 1e30):
        boxes[numbers.integers(0, count), numbers.integers(0, 4)] = value
    groups = torch.bucketize(torch.arange(count), starts[1:], right=True)
    given = boxes, groups, starts, torch.from_numpy(nms.rounded_down(threshs[: len(sizes)]))
    kept = _cuda_suppression.suppress(*given, largest=max(sizes), most_bytes=(1 << 26) * is_stored)
    assert torch.equal(kept, nms._suppress_by_numba(*given, largest=max(sizes)))

alike()
assert nms._triton_suppresses_alike(torch.device("cpu"))
"""

POOLED_ALIKE = """
import torch
from service.ops import _cuda_kernels
from torchvision.ops import roi_align

torch.manual_seed(0)
scales, levels = [1 / 4, 1 / 8, 1 / 16], torch.tensor([0, 1, 2, 0, 2])
maps = [torch.randn(2, 5, side, side + 3) for side in (16, 8, 4)]
rois = torch.tensor(
    [[0, 3.0, 4, 30, 40], [1, -9, -5, 70, 80], [1, 0, 0, 0, 0], [0, 60, 50, 61.5, 70], [1, 30, 9, 10, 40]]
)
regular = torch.cat([rois[:, :3], torch.maximum(rois[:, 1:3], rois[:, 3:])], dim=1)  # the last one is inside out
for samples in (2, 0):
    for aligned in (False, True):
        pooled = _cuda_kernels.multi_scale_roi_align(maps, rois, levels, scales, 3, samples, aligned)
        for row, roi, level in zip(pooled, regular, levels, strict=True):
            (expected,) = roi_align(maps[level], roi[None], 3, scales[level], samples, aligned)
            torch.testing.assert_close(row, expected)
half = _cuda_kernels.multi_scale_roi_align([one.half() for one in maps], rois, levels, scales, 3, 2, False)
assert half.dtype == torch.float16
whole = _cuda_kernels.multi_scale_roi_align(maps, rois, levels, scales, 3, 2, False)
torch.testing.assert_close(half.float(), whole, atol=5e-3, rtol=5e-3)
wild = torch.tensor([[0, float("nan"), 0, float("inf"), 9], [1, -1e30, -1e30, 1e30, 1e30]])
assert _cuda_kernels.multi_scale_roi_align(maps, wild, levels[:2], scales, 3, 2, False).isfinite().all()
assert _cuda_kernels.multi_scale_roi_align(maps, rois[:0], levels[:0], scales, 3, 2, False).shape == (0, 5, 3, 3)
"""

RESIZED_ALIKE = """
from types import SimpleNamespace

import torch
from service.modeling import transform as module
from service.modeling.config import TransformConfig
from service.ops.resize import gpu_resizes_alike

assert gpu_resizes_alike(torch.device("cpu"))
module.device_of = lambda device: SimpleNamespace(kernels="triton")
transform = module.Transform(TransformConfig(min_size=60, max_size=100)).eval()
for sizes in ([(40, 53), (75, 50)], [(1, 1)], [(1, 300)], [(300, 1)], [(97, 101), (120, 160)]):
    images = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8) for size in sizes]
    theirs, _ = transform([image.permute(2, 0, 1).float().div_(255) for image in images])
    ours = transform.prepare(images)
    assert ours.image_sizes == theirs.image_sizes
    torch.testing.assert_close(ours.tensors, theirs.tensors, atol=1e-4, rtol=0)
    assert ours.tensors.is_contiguous(memory_format=torch.channels_last)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from service.ops import _cuda_kernels, _cuda_resize, _cuda_suppression

numbers = {"num_boxes": "i32", "num_groups": "i32"}
names = {"boxes": "*fp32", "groups": "*i64", "starts": "*i64", "iou_threshs": "*fp32", "overlaps": "*i64"} | numbers
sources = [ASTSource(_cuda_suppression._compare, names, {})]
names = {"boxes": "*fp32", "starts": "*i64", "iou_threshs": "*fp32", "overlaps": "*i64", "keep": "*i8"}
names |= {"num_boxes": "i32", "is_stored": "constexpr", "rows_at_once": "constexpr"}
for is_stored in (False, True):
    fixed = {"is_stored": is_stored, "rows_at_once": 1024}
    sources.append(ASTSource(_cuda_suppression._go_through, names, fixed))
for capability in (80, 90):
    gpu = GPUTarget("cuda", capability, 32)
    for source in sources:
        assembly = triton.compile(source, target=gpu, options={"enable_fp_fusion": False}).asm
        assert assembly["cubin"]
        assert "fma" not in assembly["ptx"]
names = {"layout": "*i64", "scales": "*fp32", "rois": "*fp32", "levels": "*i64", "channels": "i32"}
names |= dict.fromkeys(("size", "samples", "offset", "at_once"), "constexpr")
divisible = {(index,): [["tt.divisibility", 16]] for index in range(7)}  # as addresses and 256 channels are
for kind, value_bytes in (("*fp16", 2), ("*fp32", 4)):
    for samples, offset in ((2, 0.0), (0, 0.5)):
        fixed = {"size": 7, "samples": samples, "offset": offset, "at_once": 256}
        source = ASTSource(_cuda_kernels._roi_align, names | {"cells": kind, "pooled": kind}, fixed, divisible)
        assembly = triton.compile(source, target=gpu, options={"num_warps": _cuda_kernels.warps(256, value_bytes)}).asm
        assert assembly["cubin"]
        assert "ld.global.v4.b32" in assembly["ptx"]  # 16 bytes a thread
names = dict(zip(_cuda_resize._resize.arg_names, ["*u8", "*fp32"] + ["i32"] * 6 + ["fp32"] * 8 + ["constexpr"]))
assert triton.compile(ASTSource(_cuda_resize._resize, names, {"at_once": 1024}), target=gpu).asm["cubin"]
"""


@pytest.mark.parametrize(
    ("program", "interpreted"),
    [(SUPPRESSED_ALIKE, True), (POOLED_ALIKE, True), (RESIZED_ALIKE, True), (COMPILED, False)],
    ids=["suppressed alike", "pooled alike", "resized alike", "compiled"],
)
def test_kernels_for_cuda(program: str, interpreted: bool) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
