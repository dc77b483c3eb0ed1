"""Export a run's best checkpoint to the model store, with a model card."""

from __future__ import annotations

import datetime
import errno
import math
import os
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from service.errors import ModelStoreError
from service.inference.predictor import Predictor
from service.model_store.model_card import measured_card
from service.model_store.model_toml import Dtype, ProvenanceTable
from service.model_store.store import ModelStore, StoredModel, check_name
from service.modeling.build import build_model
from service.modeling.config import ModelConfig
from service.structures import Image, Query
from service.training.dataset import CocoDataset
from service.training.evaluation import AveragePrecision, Evaluation, evaluate
from service.training.history import History
from service.training.loop import Best, evaluation_predictor

TIMED_PICTURES = 16


@dataclass(frozen=True, slots=True)
class Target:
    """Where a run writes: `store/name/version`, and its state beside it, in a folder that the store ignores."""

    store: ModelStore
    name: str
    version: int

    @property
    def state_path(self) -> Path:
        """Where the run keeps the state that it needs to resume."""
        return self.store.root / self.name / f".training-{self.version}" / "state.pt"


def target_of(out: Path) -> Target:
    """Read `STORE/NAME/VERSION`.

    Raises:
        ModelStoreError: it does not have that form, the name is invalid, or the model exists already.
    """
    name = out.parent.name
    if not out.name.isdecimal() or not name:
        raise ModelStoreError(f"expected --out STORE/NAME/VERSION such as model_store/cells/1, got {out}")
    try:
        check_name(name, out.name)
    except ModelStoreError as error:
        raise ModelStoreError(f"--out {out}: {error}") from None
    if out.exists():
        raise ModelStoreError(f"{out} exists already; a stored model is never overwritten")
    return Target(ModelStore(out.parent.parent), name, int(out.name))


def check_room(target: Target, num_bytes: int) -> None:
    """Check that the run's state can be written into its folder.

    Args:
        num_bytes: size of the state; two copies exist for a moment.

    Raises:
        ModelStoreError: the folder cannot be written, or the disk lacks space.
    """
    folder = target.state_path.parent
    try:
        probe = folder / "room.tmp"
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 2 * num_bytes)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        need = f"; the run needs {2 * num_bytes / 1e6:.0f} MB there" if error.errno == errno.ENOSPC else ""
        raise ModelStoreError(f"{folder}: cannot be written: {error.strerror}{need}") from error


def load_initial_weights(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a stored model that fit this network. If the classes differ, the last layers do not fit and are
    left out.

    Raises:
        ModelStoreError: the folder is not a good model, or none of its weights fits.
    """
    given = StoredModel(name=folder.parent.name, version=1, path=folder).load_weights()
    expected = build_model(config).state_dict()
    fitting = {key: value for key, value in given.items() if key in expected and expected[key].shape == value.shape}
    if not fitting:
        raise ModelStoreError(f"{folder}: none of its {len(given)} weights fits the network of the given model.toml")
    return fitting


def export_model(
    target: Target,
    *,
    config: ModelConfig,
    best: Best,
    val: CocoDataset,
    dtype: Dtype,
    provenance: ProvenanceTable,
    device: torch.device,
    findings: Mapping[str, Sequence[str]],
    history: History,
) -> StoredModel:
    """Write the best checkpoint into the store, with a card that gives the figures of the stored weights, and with the
    run's losses and figures as `training.csv` and `training.svg`.

    Args:
        provenance: the data, their terms and the command; the rest is filled in here.
        device: where the weights are evaluated and timed.
        findings: what was repaired and left out of the data, by split.
        history: of the run.

    Raises:
        ModelStoreError: it cannot be written, or exists already.
    """
    stored_dtype: torch.dtype = getattr(torch, dtype)
    # Half precision rounds the weights: the figures are those of the rounded weights.
    weights = {
        key: value.to(stored_dtype).float() if value.is_floating_point() else value
        for key, value in best.weights.items()
        if not key.endswith("num_batches_tracked")
    }
    predictor = evaluation_predictor(config, weights, device)
    evaluation = evaluate(predictor, val)
    provenance = provenance.model_copy(
        update={
            "created": datetime.date.today(),
            "software": {"torch": torch.__version__, "torchvision": version("torchvision")},
            "metrics": {kind: figures_of(figures) for kind, figures in evaluation.rows()},
        }
    )
    model = target.store.write_model(
        target.name,
        target.version,
        config=config,
        state_dict=weights,
        dtype=dtype,
        provenance=provenance,
        readme=_card(
            target.name,
            config=config,
            provenance=provenance,
            evaluation=evaluation,
            megabytes=sum(value.numel() for value in weights.values()) * stored_dtype.itemsize / 1e6,
            milliseconds=_milliseconds_per_image(predictor, val),
            device=device,
            findings=findings,
        ),
    )
    with suppress(OSError):  # the model is whole without them
        (model.path / "training.csv").write_text(history.csv(), encoding="utf-8")
        (model.path / "training.svg").write_text(history.svg(title=f"training of {model.key}"), encoding="utf-8")
    shutil.rmtree(target.state_path.parent, ignore_errors=True)
    return model


def _milliseconds_per_image(predictor: Predictor, val: CocoDataset) -> float:
    """Median time of one call, over pictures of the set's most common size."""
    size, _ = Counter(sample.image_size for sample in val.samples).most_common(1)[0]
    samples = [sample for sample in val.samples if sample.image_size == size][:TIMED_PICTURES]
    milliseconds = []
    for sample in samples:
        query = Query(Image(sample.read_pixels()))
        started = time.perf_counter()
        predictor.predict([query])
        milliseconds.append((time.perf_counter() - started) * 1000)
    return statistics.median(milliseconds)


def figures_of(figures: AveragePrecision) -> dict[str, int | float]:
    """COCO's names, for `[provenance.metrics]`; figures without any objects in the data set are left out."""
    named = {
        "AP": figures.ap,
        "AP50": figures.ap50,
        "AP75": figures.ap75,
        "AP_small": figures.ap_small,
        "AP_medium": figures.ap_medium,
        "AP_large": figures.ap_large,
    }
    if len(figures.ap_by_label) > 1:
        named |= {f"AP_{label}": ap for label, ap in figures.ap_by_label.items()}
        named |= {f"AP50_{label}": ap for label, ap in figures.ap50_by_label.items()}
    return {name: round(value, 4) for name, value in named.items() if not math.isnan(value)}


def _card(
    name: str,
    *,
    config: ModelConfig,
    provenance: ProvenanceTable,
    evaluation: Evaluation,
    megabytes: float,
    milliseconds: float,
    device: torch.device,
    findings: Mapping[str, Sequence[str]],
) -> str:
    """The model card, Markdown."""
    tables = {kind: figures_of(figures) for kind, figures in evaluation.rows()}
    kinds = list(tables)
    rows = [
        f"| {figure} | "
        + " | ".join(f"{tables[kind][figure]:.3f}" if figure in tables[kind] else "–" for kind in kinds)
        for figure in tables[kinds[0]]
    ]
    sections = {
        **_findings_section(findings),
        f"Validation, {evaluation.num_images} pictures": [
            f"COCO figures, at most {evaluation.max_detections} detections an image, with the weights as stored.",
            "",
            f"| | {' | '.join(kinds)} |",
            "|---|" + "---|" * len(kinds),
            *(f"{row} |" for row in rows),
        ],
    }
    return measured_card(
        name,
        f"{config.architecture}, {config.backbone.name}, {config.roi.op}. Finds {', '.join(config.labels)}.",
        {
            "data": str(provenance.data),
            "licence": provenance.licence or "not stated",
            "attribution": provenance.attribution or "not stated",
            "weights on disk": f"{megabytes:.1f} MB",
            "time per image": f"{milliseconds:.0f} ms, median, {_where(device)}",
            "made by": f"torch {torch.__version__}, torchvision {version('torchvision')}",
        },
        sections,
        command=str(provenance.command),
    )


def _where(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} CPU thread(s)"
    return torch.cuda.get_device_name(device)


def _findings_section(findings: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """What the data check repaired and left out."""
    lines = [f"- {split}: {line}" for split, found in findings.items() for line in found]
    return {"Data as they were taken": lines} if lines else {}
