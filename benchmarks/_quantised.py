"""Stored models in int8: the version that a store has, or one made on the spot from a few example pictures, whose AP
nobody measures. Time does not depend on how good the ranges are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import PIL.Image

from benchmarks._detectors import EXAMPLES
from service.model_store.model_toml import Int8Table, Int8Tolerances, ProvenanceTable
from service.model_store.quantizers import PARTS, Quantizers
from service.model_store.store import ModelStore, StoredModel
from service.training.dataset import Sample
from service.training.quantization.calibration import Recording, pictures_sha256, record
from service.training.quantization.proposing import propose
from service.training.quantization.workbench import NONE, Workbench

_PICTURES = ("blood-smear-1.jpg", "nuclei-dense.png")


def quantised(stored: StoredModel) -> StoredModel:
    """A version of a model in int8."""
    store = ModelStore(stored.path.parent.parent)
    known = [one for one in store.list() if one.name == stored.name and one.model_toml.int8 is not None]
    return known[-1] if known else _made(store, stored)


def _made(store: ModelStore, stored: StoredModel) -> StoredModel:
    samples = [_sample(EXAMPLES / name) for name in _PICTURES]
    with TemporaryDirectory() as folder:
        bench, recorded = Workbench(stored, cache_dir=Path(folder)), Path(folder, "recorded.safetensors")
        model = bench.network()
        record(bench.predictor_of(model, "float32", NONE), model, samples, recorded, advance=lambda: None)
        quantizers = _all_quantizers(bench, Recording(bench.config.transform, samples, recorded))
    table = Int8Table(
        sha256=quantizers.sha256,
        parts=PARTS if stored.model_toml.has_masks else PARTS[:2],
        pictures=len(samples),
        pictures_sha256=pictures_sha256(samples),
        nncf=version("nncf"),
        # Random weights are not held to anything.
        tolerances=Int8Tolerances(boxes=1e6, scores=1, masks=1),
    )
    return store.write_model(
        stored.name,
        store.next_version(stored.name),
        config=bench.config,
        state_dict=bench.weights,
        dtype=bench.config.weights.dtype,
        provenance=ProvenanceTable(),
        readme="Random weights, in int8.",
        int8=(table, quantizers),
    )


def _all_quantizers(bench: Workbench, recording: Recording) -> Quantizers:
    graphs = bench.graphs()
    found = {}
    for part in PARTS:
        if part == "mask_head" and not bench.config.has_masks:
            continue
        calls = list(recording.of(part))
        found[part] = propose(
            part,
            graphs.graph(part),
            calls.__iter__,
            count=len(calls),
            state=bench.weights,
            advance=lambda: None,
        ).quantizers
    return Quantizers(**found)


def _sample(path: Path) -> Sample:
    with PIL.Image.open(path) as picture:
        size = (picture.height, picture.width)
    nothing: Sequence[int] = ()
    return Sample(
        image_id=1,
        path=path,
        image_size=size,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        boxes=np.zeros((0, 4), np.float32),
        labels=np.array(nothing, np.int64),
        areas=np.array(nothing, np.float64),
        segmentations=None,
    )
