"""The sections that measure time in one process: a model's calls, kernels, training steps and JPEG decoding."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import simplejpeg
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import MultiScaleRoIAlign

from benchmarks._bench import Bench
from benchmarks._detectors import (
    as_image,
    as_jpeg,
    example_picture,
    our_predictor,
    picture_for,
    torchvision_input,
    torchvision_twin,
)
from benchmarks._gpu_answers import STRIDES, _boxes, _seeded
from benchmarks._measure import (
    Cell,
    Spread,
    alternate,
    megabytes,
    milliseconds,
    peak_memory_bytes,
    ratio,
    spread,
    until_done,
)
from benchmarks.model import STAGES as MODEL_STAGES
from benchmarks.model import stage_ms
from service.devices import device_named
from service.imaging.decode import JpegDecoder
from service.imaging.jpeg_check import checked_decoder
from service.inference.predictor import Predictor
from service.modeling.config import ModelConfig, RoIConfig
from service.modeling.poolers import RoIPooler
from service.ops.nms import best_of_each_image
from service.structures import Image, Prediction, Query, UInt8Array
from service.training.dataset import load_coco
from service.training.loop import Progress, TrainConfig, Trainer
from tests.coco_folder import write_coco_folder

CALLS = "One call: pixels to boxes, labels, scores and masks (torchvision's pasted, ours small), torchvision in float32"
STAGE_TIMES = "Ours by stage, ms of the device (the RPN's convolutions count as backbone)"
MEMORY = "Memory that a call adds to the weights"
NEW_SIZES = "The first batch of 4 of a size that was not seen before, and its best of three more"
WAITS = "How often the host waits for the device in a batch of 8"
SIZES = {"640x480": (640, 480), "1200x800": (1200, 800), "1080p": (1920, 1080)}
STAGES = (*MODEL_STAGES, "graph")
ALL_PRECISIONS_AT = "1200x800"
TORCHVISION_BATCHES = (1, 8)
Sides = tuple[Callable[[], object], Callable[[], object]]
"""Ours and torchvision's."""


def speed(bench: Bench) -> None:
    """Calls of every size, batch, engine and precision; torchvision's beside them at batches of 1 and 8."""
    half = bench.half
    main_orders = [("eager", "float32")] if bench.quick else [("graphs", half), ("compiled", half), ("eager", half)]
    others = [] if bench.quick else [("eager", precision) for precision in ("float32", "tf32", "bfloat16")]
    predictors: dict[tuple[str, str], Predictor] = {}
    for engine, precision in main_orders + others:
        with bench.apart(f"{engine} in {precision}"):
            predictors[engine, precision] = our_predictor(
                bench.stored, engine, device=bench.device, precision=precision, cache_dir=bench.cache_dir
            )
    theirs = torchvision_twin(bench.stored).to(bench.device)
    calls = _Calls(bench, theirs, main_orders)
    for batch in (1,) if bench.quick else (8, 1, 4, 16):
        for size in ("640x480",) if bench.quick else SIZES:
            chosen = {
                key: one
                for key, one in predictors.items()
                if key in main_orders or (size == ALL_PRECISIONS_AT and batch in TORCHVISION_BATCHES)
            }
            if not bench.has_seconds(10):
                print(f"no time for {size}, batch {batch}")
                continue
            with bench.apart(f"{size}, batch {batch}"):
                calls.measure(size, batch, chosen)
    for key in main_orders:
        if key in predictors:
            with bench.apart(f"waits of {' in '.join(key)}"):
                calls.count_waits(key, predictors[key])
            with bench.apart(f"new sizes by {' in '.join(key)}"):
                calls.meet_new_sizes(key, predictors[key])


class _Calls:
    """Fills the tables of `speed`."""

    def __init__(self, bench: Bench, theirs: GeneralizedRCNN, main_orders: Sequence[tuple[str, str]]) -> None:
        self._bench = bench
        self._theirs = theirs
        self._main_orders = main_orders
        self._rows: dict[str, list[list[Cell]]] = {}

    def measure(self, size: str, batch: int, predictors: dict[tuple[str, str], Predictor]) -> None:
        """Torchvision and the predictors take turns on batches of one picture."""
        bench, device = self._bench, self._bench.device
        image = as_image(example_picture(*SIZES[size], name=picture_for(bench.stored.name)))
        found: list[int] = []
        kept: dict[tuple[str, str], list[Prediction]] = {key: [] for key in predictors}
        sides: dict[str, Callable[[], object]] = {
            " ".join(key): until_done(partial(_our_call, predictor, image, batch, kept[key]), device)
            for key, predictor in predictors.items()
        }
        with_theirs = batch in TORCHVISION_BATCHES
        if with_theirs:
            sides["torchvision"] = until_done(partial(_their_call, self._theirs, image, batch, found, device), device)
        if not bench.quick:
            for predictor in predictors.values():
                predictor.predict([Query(image)] * batch)  # `graphs` records the second batch of a kind
        seconds = alternate(
            sides, rounds=2 if bench.quick else 15, most_seconds=0.5 if bench.quick else 4, least_rounds=2
        )
        for key in predictors:
            engine, precision = key
            times = seconds[" ".join(key)]
            head: list[Cell] = [size, batch, engine, precision]
            reference: list[Cell] = ["", ""]
            if with_theirs:
                reference = [milliseconds(seconds["torchvision"]), ratio(seconds["torchvision"], times)]
            per_second = spread([batch / one for one in times])
            objects = f"{found[-1] if found else '–'}, {len(kept[key][-1].detections)}"
            self._add(CALLS, [*head, objects, milliseconds(times), per_second, *reference])
            if key in self._main_orders:
                timed = kept[key][-len(times) :]
                self._add(STAGE_TIMES, [*head, *(stage_ms(timed, stage) for stage in STAGES)])
                if batch in TORCHVISION_BATCHES:
                    added = megabytes(peak_memory_bytes(sides[" ".join(key)], device))
                    self._add(MEMORY, [*head, added])

    def count_waits(self, key: tuple[str, str], predictor: Predictor) -> None:
        """In a batch of a size that was seen before, and in one of a new size."""
        seen, new = _queries(self._bench, 8, (640, 480)), _queries(self._bench, 8, (640, 352))
        predictor.predict(seen)
        if self._bench.device == "cpu":
            self._add(WAITS, [*key, "not counted on the CPU", "not counted on the CPU", ""])
            return
        with _waits() as again:
            predictor.predict(seen)
        with _waits() as first:
            predictor.predict(new)
        self._add(WAITS, [*key, len(again), len(first), ", ".join(sorted(set(again)))])

    def meet_new_sizes(self, key: tuple[str, str], predictor: Predictor) -> None:
        """Six sizes, none of which `measure` had."""
        for index in range(1 if self._bench.quick else 6):
            size = (640, 304 + 32 * index)
            queries = _queries(self._bench, 1 if self._bench.quick else 4, size)
            call = until_done(partial(predictor.predict, queries), self._bench.device)
            times = alternate({"ours": call}, rounds=4, least_rounds=4, warm_up=False)["ours"]
            first, best = 1e3 * times[0], 1e3 * min(times[1:])
            self._add(NEW_SIZES, [*key, f"{size[0]}x{size[1]}", first, best])

    def _add(self, title: str, row: list[Cell]) -> None:
        self._rows.setdefault(title, []).append(row)
        self._bench.table(title, COLUMNS[title], self._rows[title])


_HEAD = ["picture", "batch", "engine", "precision"]
COLUMNS = {
    CALLS: [*_HEAD, "objects (theirs, ours)", "ours ms", "pictures/s", "torchvision ms", "times faster"],
    STAGE_TIMES: [*_HEAD, *STAGES],
    MEMORY: [*_HEAD, "ours MB"],
    NEW_SIZES: ["engine", "precision", "picture", "first ms", "best ms"],
    WAITS: ["engine", "precision", "known size", "new size", "where"],
}


def _our_call(predictor: Predictor, image: Image, batch: int, kept: list[Prediction]) -> None:
    kept.append(predictor.predict([Query(image)] * batch)[0])


def _their_call(model: GeneralizedRCNN, image: Image, batch: int, found: list[int], device: str) -> None:
    with torch.inference_mode():
        detections = model([torchvision_input(image, device)] * batch)
    found.append(len(detections[0]["boxes"]))


def _queries(bench: Bench, count: int, size: tuple[int, int]) -> list[Query]:
    return [Query(as_image(example_picture(*size, name=picture_for(bench.stored.name))))] * count


@contextmanager
def _waits() -> Iterator[list[str]]:
    """The place of each synchronization with the device, as far as torch notices them."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    told = [one for one in seen if "synchroniz" in str(one.message) and "prototype" not in str(one.message)]
    places += [f"{Path(one.filename).name}:{one.lineno}" for one in told]


def kernels(bench: Bench) -> None:
    """Suppression and RoI Align against torchvision's on the same device."""
    rows: list[list[Cell]] = []

    def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        sides = {"theirs": until_done(theirs, bench.device), "ours": until_done(ours, bench.device)}
        seconds = alternate(sides, rounds=2 if bench.quick else 30, most_seconds=2)
        faster = ratio(seconds["theirs"], seconds["ours"])
        rows.append([name, milliseconds(seconds["theirs"]), milliseconds(seconds["ours"]), faster])
        bench.table(f"Kernels on {bench.device}", ["kernel", "torchvision ms", "ours ms", "times faster"], rows)

    cases = ((2, 100, 4),) if bench.quick else ((1, 1000, 1), (8, 1000, 1), (8, 5000, 5), (1, 6000, 1))
    for images, each, classes in cases:
        with bench.apart(f"suppression {images} x {each}"):
            ours, theirs = _suppressions(bench, images, each, classes)
            compare(f"suppression, {images} pictures x {each} boxes in {classes} groups", ours, theirs)
    for images, output_size in ((1, 7),) if bench.quick else ((1, 7), (8, 7), (8, 14)):
        with bench.apart(f"RoI Align {images} x {output_size}"):
            for precision in ("float32", bench.half):
                ours, theirs = _roi_aligns(bench, images, output_size, getattr(torch, precision))
                each = _roi_count(bench, output_size)
                name = f"RoI Align, {images} pictures x {each} boxes x 256 channels to {output_size} x {output_size}"
                compare(f"{name}, ours in {precision}", ours, theirs)


def _suppressions(bench: Bench, images: int, each: int, classes: int) -> Sides:
    boxes = torch.cat(_boxes(images, each, 1333, 800)).to(bench.device)
    generator = _seeded()
    scores = torch.rand(len(boxes), generator=generator).to(bench.device)
    labels = torch.randint(classes, (len(boxes),), generator=generator).to(bench.device)
    of_image = torch.arange(images).repeat_interleave(each).to(bench.device)
    valid = torch.ones_like(of_image, dtype=torch.bool)

    def ours() -> object:
        return best_of_each_image(
            boxes,
            scores,
            images=of_image,
            classes=labels,
            valid=valid,
            num_images=images,
            num_classes=classes,
            iou_thresh=0.7,
            largest_group=each,
        )

    def theirs() -> object:
        return [
            torchvision.ops.batched_nms(*part, 0.7)
            for part in zip(boxes.split(each), scores.split(each), labels.split(each), strict=True)
        ]

    return ours, theirs


def _roi_count(bench: Bench, output_size: int) -> int:
    """As many boxes of a picture as there are proposals, or detections with masks."""
    return 10 if bench.quick else 1000 if output_size == 7 else 100


def _roi_aligns(bench: Bench, images: int, output_size: int, dtype: torch.dtype) -> Sides:
    height, width = (160, 224) if bench.quick else (800, 1216)
    channels = 16 if bench.quick else 256
    maps = {
        name: torch.randn(images, channels, height // stride, width // stride, device=bench.device)
        for name, stride in STRIDES.items()
    }
    halves = {name: one.to(dtype).contiguous(memory_format=torch.channels_last) for name, one in maps.items()}
    boxes = [one.to(bench.device) for one in _boxes(images, _roi_count(bench, output_size), width, height)]
    sizes = [(height, width)] * images
    ours = RoIPooler(roi=RoIConfig(), output_size=output_size, strides=STRIDES)
    theirs = MultiScaleRoIAlign(list(STRIDES), output_size, 2)

    def pool(pooler: Callable[..., Tensor], features: dict[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return pooler(features, boxes, sizes)

    return partial(pool, ours, halves), partial(pool, theirs, maps)


def training(bench: Bench) -> None:
    """Steps of `roiserve train`'s own loop on pictures of discs, in both precisions."""
    network = _TINY if bench.quick else _MASK_RCNN
    steps = 2 if bench.quick else 16
    rows: list[list[Cell]] = []
    with TemporaryDirectory() as name:
        data = write_coco_folder(Path(name) / "data", train=4 * steps, val=2)
        for precision in ("float32", "bfloat16"):
            if not bench.has_seconds(8):
                print(f"no time for {precision}")
                continue
            with bench.apart(f"training in {precision}"):
                config = TrainConfig(
                    epochs=1,
                    images_per_step=4,
                    crop_size=96 if bench.quick else 512,
                    warmup_steps=2,
                    learning_rate=1e-4,
                    evaluate_every=1,
                    precision=precision,
                )
                trainer = Trainer(
                    model_config=network,
                    train_config=config,
                    train=load_coco(data / "train.json"),
                    val=load_coco(data / "val.json"),
                    state_path=Path(name) / precision / "state.pt",
                    device=torch.device(bench.device),
                    workers=2 if bench.quick else 8,
                )
                clock = _StepClock()
                memory = peak_memory_bytes(partial(trainer.run, on_step=clock.note), bench.device)
                rows.append([precision, len(clock.ends), clock.step_ms(), *clock.losses(), megabytes(memory)])
                columns = ["precision", "steps", "a step of 4 pictures, ms", "first loss", "last loss", "memory MB"]
                bench.table("Training steps", columns, rows)


class _StepClock:
    """When each step ended, and the sum of its losses."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._losses: list[float] = []

    def note(self, progress: Progress) -> None:
        self.ends.append(time.perf_counter())
        self._losses.append(sum(progress.losses.values()))

    def step_ms(self) -> Spread:
        """Without the first steps, which find out how to run convolutions."""
        took = np.diff(self.ends)
        return milliseconds(took[min(3, len(took) - 1) :].tolist())

    def losses(self) -> list[Cell]:
        return [self._losses[0], self._losses[-1]]


_MASK_RCNN = ModelConfig.model_validate(
    {"architecture": "mask_rcnn", "labels": ["disc"], "backbone": {"name": "resnet50_fpn", "norm": "batch_norm"}}
)
_TINY = ModelConfig.model_validate(
    {
        "architecture": "mask_rcnn",
        "labels": ["disc"],
        "backbone": {"name": "narrow_resnet18_fpn", "width": 8, "out_channels": 16, "norm": "batch_norm"},
        "transform": {"min_size": 96, "max_size": 128},
        "rpn": {"pre_nms_top_n_train": 100, "post_nms_top_n_train": 50},
        "roi": {"box_head_channels": 32, "mask_head_channels": [16], "batch_size_per_image": 32},
    }
)


def jpeg(bench: Bench) -> None:
    """What `jpeg_decoder = cuda` runs (nvJPEG; torchvision's decoder on the CPU) against libjpeg-turbo in one thread:
    pixels and time.
    """
    rows: list[list[Cell]] = []
    decoder = _jpeg_decoder(bench.device)
    with bench.apart("check at start"):
        outcome = "fails" if checked_decoder(decoder) is None else "passes"
        bench.table(f"The check of a JPEG decoder at start, on {bench.device}", ["outcome"], [[outcome]])
    count = 2 if bench.quick else 8
    for name, size in {"640x480": (640, 480)}.items() if bench.quick else SIZES.items():
        for progressive in (False, True):
            with bench.apart(f"{name}{', progressive' if progressive else ''}"):
                data = as_jpeg(example_picture(*size), progressive=progressive)
                encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8)] * count
                together = partial(_decode_on, bench.device, encoded)
                sides: dict[str, Callable[[], object]] = {
                    "libjpeg": partial(_decode_one_by_one, simplejpeg.decode_jpeg, [data] * count),
                    "decoder": partial(_decode_one_by_one, decoder, [data] * count),
                    "together": until_done(together, bench.device),
                }
                seconds = alternate(sides, rounds=2 if bench.quick else 10, most_seconds=2)
                difference = np.abs(decoder(data).astype(int) - simplejpeg.decode_jpeg(data))
                rows.append(
                    [
                        f"{count} x {name}{', progressive' if progressive else ''}",
                        *(milliseconds(seconds[side]) for side in sides),
                        int(difference.max()),
                        float(difference.mean()),
                    ]
                )
                columns = [
                    "pictures",
                    "simplejpeg ms",
                    "torchvision, one by one to the host, ms",
                    "together, left on the device, ms",
                    "largest difference",
                    "mean difference",
                ]
                bench.table(f"JPEG to RGB pixels, on {bench.device} by torchvision", columns, rows)


def _jpeg_decoder(device: str) -> JpegDecoder:
    if device == "cuda":
        return device_named(device).jpeg_decoder()

    def decode(data: bytes) -> UInt8Array:
        [planes] = _decode_on(device, [torch.frombuffer(bytearray(data), dtype=torch.uint8)])
        pixels: UInt8Array = planes.permute(1, 2, 0).contiguous().numpy()
        return pixels

    return decode


def _decode_on(device: str, encoded: list[Tensor]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces another package for this
        return [*torchvision.io.decode_jpeg(encoded, mode=torchvision.io.ImageReadMode.RGB, device=device)]


def _decode_one_by_one(decode: JpegDecoder, pictures: Sequence[bytes]) -> list[UInt8Array]:
    return [decode(one) for one in pictures]
