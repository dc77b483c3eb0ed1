"""The sections that compare answers: operators, engines and precisions on a device with the CPU's or torchvision's."""

from __future__ import annotations

import asyncio
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version

import numpy as np
import torch
import torchvision
from torch import Tensor

from benchmarks._bench import RANDOM_MODEL, Bench, first, free_gigabytes
from benchmarks._detectors import (
    BUNDLED,
    as_image,
    as_jpeg,
    example_picture,
    picture_for,
    random_detector,
    store_detector,
)
from benchmarks._measure import Cell, matrix_products, megabytes
from service.devices import choose_device
from service.inference.loading import load_predictor
from service.inference.predictor import Predictor
from service.metrics import Observed
from service.modeling.config import RoIConfig, TransformConfig
from service.modeling.poolers import RoIPooler
from service.modeling.transform import Transform
from service.ops import crop
from service.ops.nms import best_of_each_image
from service.settings import Settings
from service.structures import Detections, DetectOptions, Encoded, Image, Job, Json, Progress, Query
from service.workers.local import LocalDetector
from service.workers.stored import stored_predictors

BEST = 20
"""Objects of each picture that are compared, the surest: of hundreds, rounding decides which are suppressed."""
LEAST_MATCHED = {"float32": 0.95, "tf32": 0.8, "float16": 0.8, "bfloat16": 0.5}
"""The share of them that has to be found, by precision: random weights score hundreds of boxes much alike."""
FLOAT32_BOXES, FLOAT32_SCORES = 0.05, 1e-3
"""What float32 may differ by from the CPU's, in pixels of pictures of up to 1920, and as a probability."""
KEPT_BYTES = 64_000_000
"""What a model that was loaded and unloaded a second time may leave more than after the first."""
STRIDES = {"0": 4, "1": 8, "2": 16, "3": 32}


def prepare(bench: Bench) -> None:
    """The model and the pictures that the other sections use."""
    if not bench.quick:
        builder = RANDOM_MODEL.replace("-", "_")
        shutil.rmtree(bench.store, ignore_errors=True)
        model = random_detector(builder, as_image(example_picture(1200, 800)))
        store_detector(model, builder, bench.store)
        shutil.copytree(BUNDLED / "blood-cells", bench.store / "blood-cells")
    folder = bench.folder / "pictures"
    folder.mkdir(exist_ok=True)
    for index, size in enumerate(photograph_sizes(4 if bench.quick else 24)):
        picture = example_picture(*size, name=picture_for(bench.stored.name))
        (folder / f"{index:02}.jpg").write_bytes(as_jpeg(picture))


def photograph_sizes(count: int) -> Iterator[tuple[int, int]]:
    """(width, height) as photographs in collections have them: the longer side 640, the other one anything."""
    numbers = np.random.default_rng(0)
    for _ in range(count):
        short = int(numbers.integers(360, 520))
        yield (640, short) if numbers.random() < 0.75 else (short, 640)


def versions(bench: Bench) -> None:
    """What is there, and what the device can do at best."""
    rows: list[list[Cell]] = [
        ["Python", platform.python_version()],
        ["torch", f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"],
        ["torchvision", version("torchvision")],
        ["gcc", _said("gcc", "--version")],
        ["nvcc", _said("nvcc", "--version", line=-1)],
        ["free disk GB", free_gigabytes(bench.folder)],
        ["compiled code of an earlier run", "yes" if bench.cache_dir.exists() else "no"],
        ["JPEG decoder", "nvJPEG" if bench.device == "cuda" else "libjpeg"],
    ]
    if bench.device == "cuda":
        names = "name,driver_version,memory.total,pcie.link.gen.current,power.limit"
        rows.append(["nvidia-smi", _said("nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader")])
        facts = torch.cuda.get_device_properties(0)
        rows.append(["compute capability", f"{facts.major}.{facts.minor}, {facts.multi_processor_count} processors"])
        rows.append(["GPUs", torch.cuda.device_count()])
    side = 512 if bench.quick else 8192
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with bench.apart(f"product in {dtype}"):
            products, flop = matrix_products(side, device=bench.device, dtype=dtype)
            rows.append([f"{dtype} product, TFLOP/s", flop / _best_seconds(products["torch"]) / 1e12])
    with bench.apart("Triton"):
        device = choose_device(bench.device)
        rows.append(["kernels", str(device.kernels)])
        if bench.device == "cuda":
            rows.append(["torch.compile", device.compiler_problem or "works"])
    bench.table("Versions", ["what", "value"], rows)
    if bench.device == "cuda" and device.kernels != "triton":
        bench.problems.append("Triton does not work here: see the log for why")


def _best_seconds(call: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _said(*command: str, line: int = 0) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return (run.stdout or run.stderr).strip().splitlines()[line]
    except (OSError, IndexError, subprocess.TimeoutExpired) as error:
        return f"none: {first(str(error))}"


def operators(bench: Bench) -> None:
    """Each operator on the device against the same on the CPU in float32, over the same numbers."""
    rows: list[list[Cell]] = []

    def compare(name: str, ours: Tensor, theirs: Tensor, *, tolerance: float, share: float = 0.0) -> None:
        """`share` of the values may be beyond the tolerance: of operators that round."""
        difference = (ours.float().cpu() - theirs.float()).abs()
        beyond = int((difference > tolerance).sum()) if ours.isfinite().all() else difference.numel()
        passes = beyond <= share * difference.numel()
        largest = f"{float(difference.max()):.1e}"
        rows.append([name, largest, f"{tolerance:g}", f"{beyond} of {difference.numel()}", "yes" if passes else "no"])
        bench.table(
            f"Operators on {bench.device} against the CPU",
            ["operator", "largest difference", "tolerance", "values beyond it", "passes"],
            rows,
        )
        if not passes:
            bench.problems.append(f"{name} differs from the CPU's by {largest} in {beyond} of {difference.numel()}")

    for name, pooler, dtype, share in _poolers(bench):
        with bench.apart(name):
            ours, theirs = _pooled(pooler, bench, dtype)
            compare(name, ours, theirs, tolerance=1e-4 if dtype == torch.float32 else 0.02, share=share)
    with bench.apart("crop"):
        images, (rois,) = torch.randn(2, 3, 200, 300, generator=_seeded()), _boxes(1, 50, 300, 200)
        rois = torch.cat([torch.arange(len(rois)).remainder(2).unsqueeze(1), rois], dim=1)
        ours = crop(images.to(bench.device), rois.to(bench.device), 64)
        compare("crop", ours, crop(images, rois, 64), tolerance=1e-4)
    with bench.apart("transform"):
        pictures = [torch.from_numpy(np.array(example_picture(*size))) for size in ((640, 480), (500, 375))]
        ours, theirs = (
            Transform(TransformConfig()).eval().to(device).prepare([one.to(device) for one in pictures]).tensors
            for device in (bench.device, "cpu")
        )
        compare("transform", ours, theirs, tolerance=1e-4)
    with bench.apart("suppression"):
        for per_image, num_classes in ((100, 4), (200, 90)) if bench.quick else ((1000, 5), (1000, 90), (6000, 1)):
            ours, theirs = _suppressed(bench.device, per_image, num_classes)
            compare(f"suppression, 8 x {per_image} boxes, {num_classes} classes", ours, theirs, tolerance=0)


def _poolers(bench: Bench) -> Iterator[tuple[str, RoIPooler, torch.dtype, float]]:
    for op, sampling_ratio, aligned in (
        ("roi_align", 2, False),
        ("roi_align", 0, True),
        ("roi_align_max", 2, False),
        ("roi_pool", 2, False),
        ("roi_warp", 2, False),
        ("spp", 2, False),
    ):
        roi = RoIConfig.model_validate({"op": op, "sampling_ratio": sampling_ratio, "aligned": aligned})
        pooler = RoIPooler(roi=roi, output_size=(4, 2, 1) if op == "spp" else 7, strides=STRIDES)
        for dtype in (torch.float32, getattr(torch, bench.half)):
            # A box at the middle between two cells may be rounded to either.
            share = 0.0 if op == "roi_align" else 0.001
            name = f"{op}, {sampling_ratio} samples, aligned={aligned}, {str(dtype).removeprefix('torch.')}"
            yield name, pooler, dtype, share


def _pooled(pooler: RoIPooler, bench: Bench, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    side = 128 if bench.quick else 800
    generator = _seeded()
    channels = 8 if bench.quick else 256
    maps = {
        name: torch.randn(2, channels, side // stride, side // stride, generator=generator).to(dtype)
        for name, stride in STRIDES.items()
    }
    boxes = _boxes(2, 20 if bench.quick else 200, side, side)
    there = {name: one.to(bench.device).contiguous(memory_format=torch.channels_last) for name, one in maps.items()}
    with torch.inference_mode():
        ours = pooler(there, [one.to(bench.device) for one in boxes], [])
        theirs = pooler({name: one.float() for name, one in maps.items()}, boxes, [])
    return ours, theirs


def _suppressed(device: str, per_image: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """(K,) which boxes are kept, as 0 and 1: ours, and torchvision's on the same device, image by image."""
    images = 8
    boxes = torch.cat(_boxes(images, per_image, 1333, 800)).to(device)
    generator = _seeded()
    scores = torch.rand(len(boxes), generator=generator).to(device)
    classes = torch.randint(num_classes, (len(boxes),), generator=generator).to(device)
    of_image = torch.arange(images).repeat_interleave(per_image).to(device)
    kept = best_of_each_image(
        boxes,
        scores,
        images=of_image,
        classes=classes,
        valid=torch.ones_like(of_image, dtype=torch.bool),
        num_images=images,
        num_classes=num_classes,
        iou_thresh=0.5,
        largest_group=per_image,
    )
    ours, theirs = torch.zeros(len(boxes)), torch.zeros(len(boxes))
    for index, rows in enumerate(kept.up_to([per_image] * images)):
        ours[rows.cpu()] = 1
        own = slice(index * per_image, (index + 1) * per_image)
        rows = torchvision.ops.batched_nms(boxes[own], scores[own], classes[own], 0.5)
        theirs[rows.cpu() + own.start] = 1
    return ours, theirs


def _boxes(images: int, each: int, width: int, height: int) -> list[Tensor]:
    """(each, 4) boxes of each image, of 8 pixels to half of its sides."""
    generator = _seeded()
    extent = torch.tensor([float(width), float(height)])
    boxes = []
    for _ in range(images):
        sides = 8 + torch.rand(each, 2, generator=generator) * (extent / 2 - 8)
        corners = torch.rand(each, 2, generator=generator) * (extent - sides)
        boxes.append(torch.cat([corners, corners + sides], dim=1))
    return boxes


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def engines(bench: Bench) -> None:
    """Each engine and precision against `eager` in float32 on the CPU, and by its own verification."""
    images = [as_image(example_picture(*size, name=picture_for(bench.stored.name))) for size in _sizes(bench)]
    reference = _answers(load_predictor(bench.stored, device="cpu", engine="eager"), images)
    precisions = [one for one in choose_device(bench.device).precisions if one in LEAST_MATCHED]
    orders = [("eager", precision) for precision in (precisions[:2] if bench.quick else precisions)]
    if not bench.quick:
        orders += [("graphs", precision) for precision in (bench.half, "float32")]
        orders += [("compiled", precision) for precision in (bench.half, "float32", "tf32", "bfloat16")]
    rows: list[list[Cell]] = []
    for engine, precision in orders:
        name = f"{engine} in {precision}"
        if not bench.has_seconds(5 if engine == "eager" else 30):
            rows.append([engine, precision, "left out: no time", "", "", "", "", "", ""])
            continue
        with bench.apart(name):
            begin = time.perf_counter()
            predictor = load_predictor(
                bench.stored, device=bench.device, engine=engine, precision=precision, cache_dir=bench.cache_dir
            )
            loaded = time.perf_counter()
            predictor.warm_up()
            warm = time.perf_counter()
            _answers(predictor, images)  # `graphs` records the sizes that it meets again
            found = _answers(predictor, images)
            matched, of, boxes, scores = differences(reference, found)
            counts = f"{sum(map(len, reference))}, {sum(map(len, found))}"
            rows.append(
                [
                    engine,
                    precision,
                    str(predictor.info.verification or "is the reference"),
                    loaded - begin,
                    warm - loaded,
                    counts,
                    f"{matched} of {of}",
                    boxes,
                    scores,
                ]
            )
            if matched < LEAST_MATCHED[precision] * of:
                bench.problems.append(f"{name}: only {matched} of the CPU's {of} surest objects were found")
            if precision == "float32" and (boxes > FLOAT32_BOXES or scores > FLOAT32_SCORES):
                bench.problems.append(f"{name}: boxes differ by {boxes:.2g} pixels, scores by {scores:.2g}")
            del predictor
        bench.table(
            f"Engines on {bench.device} against eager in float32 on the CPU, {len(images)} pictures",
            [
                "engine",
                "precision",
                "verification",
                "load s",
                "warm-up s",
                "objects (CPU, here)",
                f"of the {BEST} surest a picture",
                "boxes, pixels",
                "scores",
            ],
            rows,
        )


def _sizes(bench: Bench) -> Sequence[tuple[int, int]]:
    return ((320, 240),) if bench.quick else ((640, 480), (1200, 800), (1920, 1080))


def _answers(predictor: Predictor, images: Sequence[Image]) -> list[Detections]:
    return [predictor.predict([Query(image)])[0].detections for image in images]


def differences(reference: Sequence[Detections], found: Sequence[Detections]) -> tuple[int, int, float, float]:
    """Look for the surest objects of the reference.

    Returns:
        How many were found (of the same label, with an IoU of 0.5 or more), of how many, and the largest differences of
        their boxes, in pixels, and scores.
    """
    matched = of = 0
    boxes = scores = 0.0
    for expected, ours in zip(reference, found, strict=True):
        best = expected[slice(BEST)]
        of += len(best)
        if not len(best) or not len(ours):
            continue
        ious = torchvision.ops.box_iou(torch.from_numpy(best.boxes), torch.from_numpy(ours.boxes)).numpy()
        ious[best.labels[:, None] != ours.labels[None]] = 0
        partners = ious.argmax(axis=1)
        is_found = ious.max(axis=1) >= 0.5
        matched += int(is_found.sum())
        if is_found.any():
            boxes = max(boxes, float(np.abs(best.boxes - ours.boxes[partners])[is_found].max()))
            scores = max(scores, float(np.abs(best.scores - ours.scores[partners])[is_found].max()))
    return matched, of, boxes, scores


def unload(bench: Bench) -> None:
    """Memory before a model is loaded beside another one, while it serves, and after it was unloaded, three times."""
    rows: list[list[Cell]] = []
    left: list[float] = []

    def note(step: str, memory: Mapping[tuple[str, str], float]) -> None:
        for (device, kind), size in memory.items():
            if kind != "total":
                rows.append([step, device, kind, megabytes(int(size))])

    async def run() -> None:
        settings = Settings(
            device=bench.device,
            engine="eager",
            precision="auto" if bench.device == "cpu" else "float16",
            model_store=bench.store,
            models=("blood-cells",),
            engine_cache_dir=bench.cache_dir,
        )
        detector = LocalDetector(settings, stored_predictors, _nobody_notes)
        await detector.start()
        try:
            note("before", detector.memory())
            for round_ in range(1 if bench.quick else 3):
                info = await detector.load(bench.stored.key)
                await asyncio.gather(*(detector.run(_job(info.key)) for _ in range(2 if bench.quick else 8)))
                note(f"loaded, round {round_ + 1}", detector.memory())
                await detector.unload(info.key)
                memory = detector.memory()
                note(f"unloaded, round {round_ + 1}", memory)
                left.append(sum(size for (_, kind), size in memory.items() if kind in ("reserved", "resident")))
        finally:
            await detector.stop()

    asyncio.run(run())
    bench.table("Memory of the device when a second model comes and goes", ["step", "device", "kind", "MB"], rows)
    if bench.device == "cuda" and left[-1] - left[0] > KEPT_BYTES:
        bench.problems.append(f"each unloaded model leaves memory behind: {left} bytes are reserved after the rounds")


def _nobody_notes(name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
    """An `Observe`."""


def _job(model: str) -> Job:
    return Job(
        model=model,
        source=Encoded(as_jpeg(example_picture(640, 480))),
        options=DetectOptions(),
        form=Json(),
        deadline=time.monotonic() + 60,
        progress=Progress("body"),
    )
