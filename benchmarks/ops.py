"""Our CPU kernels, and the decoder that we took, against what a user would write with torchvision, Pillow and
pycocotools: `python -m benchmarks.ops`.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import PIL.Image
import simplejpeg
import torch
import typer
from pycocotools import mask as coco
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import roi_align, roi_pool

from benchmarks._detectors import as_jpeg, example_picture
from benchmarks._measure import (
    REPORTS,
    Cell,
    Report,
    alternate,
    available_memory_bytes,
    megabytes,
    milliseconds,
    peak_memory_bytes,
    ratio,
    until_done,
)
from service.imaging.decode import ImageLimits, decode_image
from service.imaging.overlay import encode_picture
from service.masks.polygons import encode_polygons
from service.masks.rle import encode_rle
from service.modeling.config import TransformConfig
from service.modeling.transform import Transform
from service.ops._cpu_kernels import (
    OutputMemory,
    multi_scale_roi_align_channels_last,
    multi_scale_roi_pool_channels_last,
)
from service.ops.multi_scale import assign_levels
from service.structures import Float32Array, UInt8Array

PICTURES = Path("../shared/data/coco_free/images")
MASK_COLUMNS = [
    "objects",
    "image",
    "reference ms",
    "ours ms",
    "times faster",
    "reference MB",
    "ours MB",
    "IoU",
    "polygons ms",
]
IMAGE_SIZES = {"480p": (480, 640), "1080p": (1080, 1920), "12 MP": (3000, 4000)}
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def main(
    rounds: Annotated[int, typer.Option(help="How often each side is timed; fewer where a call takes long.")] = 9,
    threads: Annotated[
        int, typer.Option(help="For torch and for our RoI and resizing kernels; masks and JPEGs take one.")
    ] = 2,
    pictures: Annotated[Path, typer.Option(help="Folder of JPEGs to decode, beside ours.")] = PICTURES,
    device: Annotated[str, typer.Option(help="cpu, or cuda for the RoI operators alone, which run there.")] = "cpu",
    precision: Annotated[
        str, typer.Option(help="Of the features of our kernel on CUDA; torchvision's is float32.")
    ] = "float16",
    quick: Annotated[bool, typer.Option(help="One round, small sizes: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print a table for the RoI operators, one for decoding, one for resizing, one for PNGs and one for the masks."""
    torch.set_num_threads(threads)
    report = Report("ops", out)
    rounds = 1 if quick else rounds
    boxes = 20 if quick else 1000
    if device != "cpu":
        report.table(
            f"RoI Align on CUDA: {boxes} boxes x 256 channels x 7 x 7, 4 levels of 800 x 1088; torchvision's level by "
            f"level in float32, ours all levels at once in {precision}",
            ["operator", "torchvision ms", "ours ms", "times faster", "largest difference"],
            cuda_roi_rows(boxes, rounds, device, precision),
        )
        report.show()
        return
    report.table(
        f"RoI operators: {boxes} boxes x 256 channels x 7 x 7, 4 levels of 800 x 1088; torchvision's level by level",
        ["operator", "torchvision ms", "ours ms", "times faster", "largest difference"],
        roi_rows(boxes, rounds),
    )
    report.table(
        "JPEG to RGB pixels in one thread; ours reads the container, checks the limits and takes simplejpeg",
        ["picture", "pixels", *(f"{name} ms" for name in DECODERS), "ours, times faster"],
        [decode_row(name, jpegs, rounds) for name, jpegs in jpeg_sets(pictures, quick=quick)],
    )
    names = ["480p"] if quick else list(IMAGE_SIZES)
    report.table(
        "RGB pixels to the network's input (800 / 1333): torchvision's transform against ours",
        ["picture", "torchvision ms", "ours ms", "times faster", "largest difference"],
        [transform_row(name, rounds) for name in names],
    )
    report.table(
        "RGB pixels with a camera's grain to PNG: seconds of CPU and megabytes, by Pillow at its level and ours",
        ["picture", *(f"{name} {unit}" for name in PNG_ENCODERS for unit in ("s", "MB"))],
        [png_row(name) for name in (["480p"] if quick else PNG_SIZES)],
    )
    rows: list[list[Cell]] = []
    for name in names:
        for count in (1, 20, 100):
            rows.append(mask_row(count, name, rounds))
            report.table(
                "masks: paste_masks_in_image >= 0.5, then pycocotools.mask.encode one by one, against encode_rle",
                MASK_COLUMNS,
                rows,
            )
    report.show()


def jpeg_sets(folder: Path, *, quick: bool) -> Iterator[tuple[str, list[bytes]]]:
    """Real ones if they are there, and a picture of ours at the usual sizes."""
    found = sorted(folder.glob("*.jpg"))[:20] if folder.is_dir() else []
    if found:
        yield f"{len(found)} of {folder.parent.name}", [file.read_bytes() for file in found]
    for name, (height, width) in IMAGE_SIZES.items():
        if not quick or name == "480p":
            picture = example_picture(width, height)
            yield name, [as_jpeg(picture)]
            yield f"{name}, progressive", [as_jpeg(picture, progressive=True)]


def decode_row(name: str, jpegs: list[bytes], rounds: int) -> list[Cell]:
    sides = {decoder: partial(decode_all, decode, jpegs) for decoder, decode in DECODERS.items()}
    pixels = {decoder: decode_all(decode, jpegs) for decoder, decode in DECODERS.items()}
    for decoder in DECODERS:
        if not all(np.array_equal(*pair) for pair in zip(pixels["Pillow"], pixels[decoder], strict=True)):
            raise AssertionError(f"{decoder} decodes {name} to other pixels than Pillow")
    seconds = alternate(sides, rounds=rounds, most_seconds=10)
    total = sum(one.size // 3 for one in pixels["Pillow"])
    times = [milliseconds(seconds[decoder]) for decoder in DECODERS]
    return [name, f"{total / 1e6:.1f} M", *times, ratio(seconds["Pillow"], seconds["ours"])]


def decode_all(decode: Callable[[bytes], UInt8Array], jpegs: list[bytes]) -> list[UInt8Array]:
    return [decode(data) for data in jpegs]


def decode_with_pillow(data: bytes) -> UInt8Array:
    return np.array(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def decode_with_torchvision(data: bytes) -> UInt8Array:
    """(H, W, 3), as everything behind expects it."""
    planes = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    assert isinstance(planes, Tensor)
    return planes.permute(1, 2, 0).contiguous().numpy()


def decode_with_opencv(data: bytes) -> UInt8Array:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels is not None
    return pixels.astype(np.uint8, copy=False)


def decode_with_ours(data: bytes) -> UInt8Array:
    """With the limits, the counting of scans and the orientation."""
    return decode_image(data, limits=ImageLimits(max_image_pixels=50_000_000)).pixels


DECODERS: dict[str, Callable[[bytes], UInt8Array]] = {
    "Pillow": decode_with_pillow,
    "OpenCV": decode_with_opencv,
    "torchvision": decode_with_torchvision,
    "simplejpeg": simplejpeg.decode_jpeg,
    "ours": decode_with_ours,
}


def transform_row(name: str, rounds: int) -> list[Cell]:
    height, width = IMAGE_SIZES[name]
    pixels = torch.from_numpy(np.array(example_picture(width, height)))
    config = TransformConfig()
    ours = Transform(config).eval()
    theirs = GeneralizedRCNNTransform(config.min_size, config.max_size, list(config.mean), list(config.std)).eval()
    sides: dict[str, Callable[[], Tensor]] = {
        "reference": lambda: theirs([pixels.permute(2, 0, 1).float().div(255)])[0].tensors,
        "ours": lambda: ours.prepare([pixels]).tensors,
    }
    with torch.inference_mode():
        seconds = alternate(sides, rounds=5 * rounds)
        difference = float((sides["reference"]() - sides["ours"]()).abs().max())
    times = [milliseconds(seconds["reference"]), milliseconds(seconds["ours"])]
    return [name, *times, ratio(seconds["reference"], seconds["ours"]), f"{difference:.1e}"]


def png_row(name: str) -> list[Cell]:
    """Once each, since it takes seconds."""
    height, width = (IMAGE_SIZES | PNG_SIZES)[name]
    grain = np.random.default_rng(0).normal(0, 3, (height, width, 3)).astype(np.float32)
    pixels = np.clip(np.array(example_picture(width, height)) + grain, 0, 255).astype(np.uint8)
    row: list[Cell] = [name]
    for encode in PNG_ENCODERS.values():
        begin = time.process_time()
        encoded = encode(pixels)
        row += [round(time.process_time() - begin, 2), megabytes(len(encoded))]
        if not np.array_equal(decode_with_pillow(encoded), pixels):
            raise AssertionError(f"a PNG of {name} has other pixels")
    return row


def encode_with_pillow(pixels: UInt8Array, level: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", compress_level=level)
    return file.getvalue()


PNG_SIZES = {"1080p": (1080, 1920), "12 MP": (3000, 4000), "49 MP": (7000, 7000)}
PNG_ENCODERS: dict[str, Callable[[UInt8Array], bytes]] = {
    "level 6": partial(encode_with_pillow, level=6),
    "level 3": partial(encode_with_pillow, level=3),
    "level 1": partial(encode_with_pillow, level=1),
    "ours": partial(encode_picture, format="png"),
}


def mask_row(count: int, image: str, rounds: int) -> list[Cell]:
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
    seconds = alternate({"reference": reference, "ours": ours}, rounds=rounds, most_seconds=20)
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


def roi_rows(number: int, rounds: int) -> list[list[Cell]]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 256, int(800 * scale), int(1088 * scale), generator=generator) for scale in SCALES]
    channels_last = [feature.contiguous(memory_format=torch.channels_last) for feature in features]
    boxes = proposals(number, generator)
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1)
    levels = assign_levels([boxes], min_level=2, max_level=5)
    pooled = (channels_last, rois, levels, SCALES, (7, 7))
    memory = OutputMemory()  # as every RoI pooler has
    operators: dict[str, tuple[Callable[..., Tensor], Callable[[], Tensor]]] = {
        f"roi_align, sampling_ratio={samples}, aligned={aligned}": (
            partial(roi_align, sampling_ratio=samples, aligned=aligned),
            partial(
                multi_scale_roi_align_channels_last, *pooled, sampling_ratio=samples, aligned=aligned, memory=memory
            ),
        )
        for samples, aligned in ((2, False), (0, True))
    }
    operators["roi_pool"] = roi_pool, partial(multi_scale_roi_pool_channels_last, *pooled, memory=memory)
    rows: list[list[Cell]] = []
    for name, (operator, ours) in operators.items():
        reference = partial(level_by_level, operator, features, rois, levels)
        seconds = alternate({"reference": reference, "ours": ours}, rounds=rounds)
        difference = float((reference() - ours()).abs().max())
        times = ratio(seconds["reference"], seconds["ours"])
        rows.append(
            [name, milliseconds(seconds["reference"]), milliseconds(seconds["ours"]), times, f"{difference:.1e}"]
        )
    return rows


def cuda_roi_rows(number: int, rounds: int, device: str, precision: str) -> list[list[Cell]]:
    # Imported here: Triton comes with PyTorch for CUDA on Linux only.
    from service.ops._cuda_kernels import multi_scale_roi_align

    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 256, int(800 * scale), int(1088 * scale), generator=generator) for scale in SCALES]
    boxes = proposals(number, generator)
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], dim=1).to(device)
    levels = assign_levels([boxes], min_level=2, max_level=5).to(device)
    theirs = [feature.to(device) for feature in features]
    ours = [
        feature.to(device, getattr(torch, precision)).contiguous(memory_format=torch.channels_last)
        for feature in features
    ]
    rows: list[list[Cell]] = []
    for samples, aligned in ((2, False), (0, True)):
        operator = partial(roi_align, sampling_ratio=samples, aligned=aligned)
        sides: dict[str, Callable[[], Tensor]] = {
            "theirs": partial(level_by_level, operator, theirs, rois, levels),
            "ours": partial(multi_scale_roi_align, ours, rois, levels, SCALES, 7, samples, aligned),
        }
        seconds = alternate({name: until_done(call, device) for name, call in sides.items()}, rounds=rounds)
        difference = float((sides["theirs"]() - sides["ours"]()).abs().max())
        times = ratio(seconds["theirs"], seconds["ours"])
        name = f"roi_align, sampling_ratio={samples}, aligned={aligned}"
        rows.append([name, milliseconds(seconds["theirs"]), milliseconds(seconds["ours"]), times, f"{difference:.1e}"])
    return rows


def proposals(number: int, generator: torch.Generator) -> Tensor:
    """(number, 4) boxes of 16 to 400 pixels a side, small ones most often, clipped to 800 x 1088."""
    sides = 16 * 25 ** torch.rand(number, 2, generator=generator)
    centers = torch.rand(number, 2, generator=generator) * torch.tensor([1088.0, 800.0])
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
