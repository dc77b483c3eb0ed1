"""Our CPU kernels against what a user would write with torchvision and pycocotools: `python -m benchmarks.ops`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import typer
from pycocotools import mask as coco
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align, roi_pool

from benchmarks._measure import (
    alternate,
    available_memory_bytes,
    milliseconds,
    peak_memory_bytes,
    print_machine,
    print_table,
    ratio,
)
from service.masks.polygons import encode_polygons
from service.masks.rle import encode_rle
from service.ops._cpu_kernels import multi_scale_roi_align_channels_last, multi_scale_roi_pool_channels_last
from service.ops.multi_scale import assign_levels
from service.structures import Float32Array

IMAGE_SIZES = {"480p": (480, 640), "1080p": (1080, 1920), "12 MP": (3000, 4000)}
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def main(rounds: int = 9, threads: int = 2) -> None:
    """Print a table for the masks and one for the RoI operators.

    Args:
        rounds: how often each side is timed.
        threads: for torch and for our RoI kernels; masks are encoded on one, as a request's are.
    """
    torch.set_num_threads(threads)
    print_machine()
    print_table(
        "masks: paste_masks_in_image >= 0.5, then pycocotools.mask.encode one by one, against encode_rle",
        [
            "objects",
            "image",
            "reference ms",
            "ours ms",
            "times faster",
            "reference MB",
            "ours MB",
            "IoU",
            "polygons ms",
        ],
        [mask_row(count, name, rounds) for name in IMAGE_SIZES for count in (1, 20, 100)],
    )
    print_table(
        "RoI operators: 1000 boxes x 256 channels x 7 x 7, 4 levels of 800 x 1088; torchvision's kernel level by level",
        ["operator", "torchvision ms", "ours ms", "times faster", "largest difference"],
        roi_rows(rounds),
    )


def mask_row(count: int, image: str, rounds: int) -> list[object]:
    image_size = IMAGE_SIZES[image]
    masks, boxes = mask_head_output(count, image_size)
    ours = partial(encode_rle, masks, boxes, image_size)
    ours()
    our_memory = peak_memory_bytes(ours)
    polygons = milliseconds(
        alternate({"polygons": partial(encode_polygons, masks, boxes, image_size)}, rounds=rounds)["polygons"]
    )
    # Every canvas in float32, once in a list and once stacked, and its comparison with the threshold.
    needed = 9 * count * image_size[0] * image_size[1]
    if needed > available_memory_bytes():
        seconds = alternate({"ours": ours}, rounds=rounds)
        missing = f"not run: needs {needed / 1e9:.0f} GB"
        return [count, image, missing, milliseconds(seconds["ours"]), "", "", megabytes(our_memory), "", polygons]
    reference = partial(paste_and_encode, masks, boxes, image_size)
    reference_memory = peak_memory_bytes(reference)
    seconds = alternate({"reference": reference, "ours": ours}, rounds=rounds)
    agreement = min(float(coco.iou([a], [b], [0])[0, 0]) for a, b in zip(reference(), ours(), strict=True))
    return [
        count,
        image,
        milliseconds(seconds["reference"]),
        milliseconds(seconds["ours"]),
        ratio(seconds["reference"], seconds["ours"]),
        megabytes(reference_memory),
        megabytes(our_memory),
        f"{agreement:.5f}",
        polygons,
    ]


def megabytes(memory_bytes: int) -> str:
    return f"{memory_bytes / 1e6:.1f}"


def mask_head_output(count: int, image_size: tuple[int, int]) -> tuple[Float32Array, Float32Array]:
    """Blobs with a few parts and holes, in boxes of a tenth to a half of the image's sides."""
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=(count, 1, 5, 5)))
    masks = torch.nn.functional.interpolate(noise, size=(28, 28), mode="bicubic")[:, 0].mul(4).sigmoid()
    extent = np.array([image_size[1], image_size[0]])
    sides = rng.uniform(0.1, 0.5, (count, 2)) * extent
    corners = rng.random((count, 2)) * (extent - sides)
    return masks.numpy().astype(np.float32), np.concatenate([corners, corners + sides], axis=1).astype(np.float32)


def paste_and_encode(masks: Float32Array, boxes: Float32Array, image_size: tuple[int, int]) -> list[dict[str, object]]:
    canvases = paste_masks_in_image(torch.from_numpy(masks)[:, None], torch.from_numpy(boxes), image_size)
    return [coco.encode(np.asfortranarray(pixels, np.uint8)) for pixels in (canvases[:, 0] >= 0.5).numpy()]


def roi_rows(rounds: int) -> list[list[object]]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 256, int(800 * scale), int(1088 * scale), generator=generator) for scale in SCALES]
    channels_last = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    boxes = proposals(generator)
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
    levels = assign_levels([boxes], min_level=2, max_level=5)
    pooled = (channels_last, rois, levels, SCALES, (7, 7))
    operators: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
        f"roi_align, sampling_ratio={samples}, aligned={aligned}": (
            partial(roi_align, sampling_ratio=samples, aligned=aligned),
            partial(multi_scale_roi_align_channels_last, *pooled, sampling_ratio=samples, aligned=aligned),
        )
        for samples, aligned in ((2, False), (0, True))
    }
    operators["roi_pool"] = roi_pool, partial(multi_scale_roi_pool_channels_last, *pooled)
    rows = []
    for name, (operator, ours) in operators.items():
        reference = partial(level_by_level, operator, features, rois, levels)
        seconds = alternate({"reference": reference, "ours": ours}, rounds=rounds)
        difference = float((reference() - ours()).abs().max())
        times = ratio(seconds["reference"], seconds["ours"])
        rows.append(
            [name, milliseconds(seconds["reference"]), milliseconds(seconds["ours"]), times, f"{difference:.1e}"]
        )
    return rows


def proposals(generator: torch.Generator) -> Tensor:
    """(1000, 4) boxes of 16 to 400 pixels a side, small ones most often, clipped to 800 x 1088."""
    sides = 16 * 25 ** torch.rand(1000, 2, generator=generator)
    centers = torch.rand(1000, 2, generator=generator) * torch.tensor([1088.0, 800.0])
    boxes = torch.cat([centers - sides / 2, centers + sides / 2], dim=1)
    return boxes.clamp(min=torch.zeros(4), max=torch.tensor([1088.0, 800.0, 1088.0, 800.0]))


def level_by_level(operator: Callable[..., Tensor], features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
    """As torchvision's MultiScaleRoIAlign does: pool the boxes of each level, put the patches in the boxes' order."""
    pooled = features[0].new_empty(len(rois), features[0].shape[1], 7, 7)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        pooled[levels == level] = operator(feature, rois[levels == level], (7, 7), scale)
    return pooled


if __name__ == "__main__":
    typer.run(main)
