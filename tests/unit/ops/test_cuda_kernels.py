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
import torch
from service.ops import _cuda_kernels
from service.ops.nms import _suppress_by_numba

torch.manual_seed(0)
corners = torch.rand(60, 2) * 60
boxes = torch.cat([corners, corners + 10 + torch.rand(60, 2) * 30], dim=1)
boxes[5] = boxes[4]
boxes[7] = 0
starts = torch.tensor([0, 20, 20, 50])  # an empty group, and ten boxes of no group
_cuda_kernels._BOXES_AT_ONCE = 16
for iou_thresh in (0.3, 0.5, 0.7):
    kept, expected = _cuda_kernels.suppress(boxes, starts, iou_thresh), _suppress_by_numba(boxes, starts, iou_thresh)
    assert 20 < int(expected.sum()) < 50
    assert torch.equal(kept, expected)
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

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from service.ops import _cuda_kernels

gpu = GPUTarget("cuda", 80, 32)
names = {"boxes": "*fp32", "starts": "*i64", "keep": "*i8", "iou_thresh": "fp32", "at_once": "constexpr"}
source = ASTSource(_cuda_kernels._suppress, names, {"at_once": 1024})
assert "fma" not in triton.compile(source, target=gpu, options={"enable_fp_fusion": False}).asm["ptx"]
names = {"cells": "*fp16", "layout": "*i64", "scales": "*fp32", "rois": "*fp32", "levels": "*i64", "pooled": "*fp16"}
names |= {"channels": "i32"} | dict.fromkeys(("size", "samples", "offset", "at_once"), "constexpr")
for samples, offset in ((2, 0.0), (0, 0.5)):
    fixed = {"size": 7, "samples": samples, "offset": offset, "at_once": 256}
    assert triton.compile(ASTSource(_cuda_kernels._roi_align, names, fixed), target=gpu).asm["cubin"]
"""


@pytest.mark.parametrize(
    ("program", "interpreted"),
    [(SUPPRESSED_ALIKE, True), (POOLED_ALIKE, True), (COMPILED, False)],
    ids=["suppressed alike", "pooled alike", "compiled"],
)
def test_kernels_for_cuda(program: str, interpreted: bool) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpreted else "0"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
