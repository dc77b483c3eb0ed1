"""What the parts of a network get to see: the inputs of each, recorded while the float network answers pictures,
through the same preprocessing, proposals and RoI operators as in the server.

Shapes: as the parts' graphs take them, patches channels last (`service/inference/engines/openvino.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from service.errors import ModelStoreError
from service.inference.predictor import Predictor
from service.model_store.quantizers import Part
from service.modeling.config import TransformConfig
from service.modeling.generalized_rcnn import GeneralizedRCNN
from service.modeling.parts import Parts
from service.modeling.transform import Transform
from service.structures import DetectOptions, Image, Query
from service.training.dataset import CocoDataset, Sample

BOX_PATCHES, MASK_PATCHES = 32, 16
"""Patches that are kept of each picture, evenly from the best to the worst."""

Array = NDArray[Any]


def chosen_samples(dataset: CocoDataset, count: int) -> Sequence[Sample]:
    """Pictures from the whole of a data set, at equal distances."""
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    return [dataset.samples[place] for place in places]


def pictures_sha256(samples: Sequence[Sample]) -> str:
    """A hash of the hashes of the pictures' files."""
    return hashlib.sha256("\n".join(sample.digest for sample in samples).encode()).hexdigest()


class Recording:
    """The inputs of each part. The trunk's are made anew whenever they are read: pictures are small, tensors are not.

    Args:
        transform: the network's preprocessing, which makes the trunk's inputs.
        samples: the pictures.
        file: where the heads' inputs are, as `record` wrote them.
    """

    def __init__(self, transform: TransformConfig, samples: Sequence[Sample], file: Path) -> None:
        self._transform = Transform(transform)
        self._samples = samples
        self._heads = safetensors.numpy.load_file(file)

    def of(self, part: Part) -> Iterator[tuple[Array, ...]]:
        """The inputs of one part, call by call."""
        if part == "trunk":
            for sample in self._samples:
                batch = self._transform.prepare([torch.from_numpy(sample.read_pixels())])
                yield (batch.tensors.contiguous().numpy(),)
            return
        calls = sum(key.startswith(f"{part}.") and key.endswith(".0") for key in self._heads)
        for call in range(calls):
            names = (f"{part}.{call}.{index}" for index in range(2))
            yield tuple(self._heads[name] for name in names if name in self._heads)


def record(
    predictor: Predictor,
    model: GeneralizedRCNN,
    samples: Sequence[Sample],
    file: Path,
    *,
    advance: Callable[[], None],
) -> None:
    """Answer every picture, and keep what the heads got.

    Args:
        predictor: in float32.
        model: its network.
        file: written whole or not at all.
        advance: called after every picture.

    Raises:
        ModelStoreError: the file cannot be written.
    """
    kept: dict[str, Array] = {}
    parts = model.parts or model.own_parts()
    model.parts = _listening(parts, kept)
    # The best detections of every picture, however low they score: some calibration pictures may be empty.
    options = DetectOptions(score_thresh=0.0, max_detections=MASK_PATCHES)
    try:
        for sample in samples:
            predictor.predict([Query(Image(sample.read_pixels()), options)])
            advance()
    finally:
        model.parts = parts
    unfinished = file.with_suffix(".unfinished")
    try:
        safetensors.numpy.save_file(kept, unfinished)
        unfinished.replace(file)
    except (OSError, SafetensorError) as error:
        raise ModelStoreError(f"{file}: cannot be written: {error}") from error


def _listening(parts: Parts, kept: dict[str, Array]) -> Parts:
    counts = {"box_head": 0, "mask_head": 0}

    def keep(part: str, most: int, *inputs: Tensor) -> None:
        if len(inputs[0]):
            rows = np.linspace(0, len(inputs[0]) - 1, min(most, len(inputs[0]))).round().astype(int)
            for index, one in enumerate(inputs):
                in_last = one.permute(0, 2, 3, 1) if one.ndim == 4 else one
                kept[f"{part}.{counts[part]}.{index}"] = np.ascontiguousarray(in_last.numpy()[rows])
            counts[part] += 1

    def run_box_head(pooled: Tensor) -> tuple[Tensor, Tensor]:
        keep("box_head", BOX_PATCHES, pooled)
        return parts.box_head(pooled)

    def run_mask_head(pooled: Tensor, labels: Tensor) -> Tensor:
        keep("mask_head", MASK_PATCHES, pooled, labels)
        assert parts.mask_head is not None
        return parts.mask_head(pooled, labels)

    return Parts(
        trunk=parts.trunk,
        backbone=parts.backbone,
        box_head=run_box_head,
        mask_head=None if parts.mask_head is None else run_mask_head,
    )
