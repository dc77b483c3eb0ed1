"""One network under several RoI operators: with the same weights, or retrained for each. Returns figures and text
tables; prints nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from service.inference.predictor import Predictor
from service.modeling.config import ModelConfig
from service.structures import DetectOptions, ModelInfo, Prediction, Query
from service.training.dataset import CocoDataset
from service.training.evaluation import AveragePrecision, Evaluation, Predicts, evaluate, query_of
from service.training.figures import FIGURES, NOTE, mean_and_spread
from service.training.loop import Progress, TrainConfig, Trainer, evaluation_predictor
from service.training.proposals import ProposalCache
from service.training.run_folder import locked

COLUMNS = ("operator", "of", *FIGURES.values(), "ms per image")


@dataclass(frozen=True, slots=True)
class Run:
    """One evaluation under one operator.

    Attributes:
        milliseconds_per_image: median time of a single picture, from pixels to boxes and small masks, with as many
            detections as count in the evaluation; excludes the search for proposals.
    """

    roi_op: str
    evaluation: Evaluation
    milliseconds_per_image: float


class _Operated:
    """A predictor under another operator, timed."""

    def __init__(self, predictor: Predicts, roi_op: str) -> None:
        self._predictor = predictor
        self._roi_op = roi_op
        self.seconds: list[float] = []

    @property
    def info(self) -> ModelInfo:
        return self._predictor.info

    def predict(self, queries: Sequence[Query]) -> list[Prediction]:
        queries = [Query(query.image, replace(query.options, roi_op=self._roi_op)) for query in queries]
        started = time.perf_counter()
        predictions = self._predictor.predict(queries)
        self.seconds.append(time.perf_counter() - started)
        return predictions


def measure(
    predictor: Predicts,
    dataset: CocoDataset,
    *,
    roi_op: str,
    proposals: ProposalCache | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Run:
    """Evaluate a predictor with the box and the mask branch under this operator, one of its `roi_ops`.

    Args:
        proposals: of the data set's pictures, for a network without an RPN.
        advance: called after every picture.
    """
    operated = _Operated(predictor, roi_op)
    # The first call compiles kernels and allocates memory, so it is not timed.
    operated.predict([query_of(dataset.samples[0], DetectOptions(), proposals)])
    operated.seconds.clear()
    evaluation = evaluate(operated, dataset, proposals=proposals, advance=advance)
    return Run(roi_op, evaluation, 1000 * statistics.median(operated.seconds))


def retrain(
    config: ModelConfig,
    *,
    roi_op: str,
    train_config: TrainConfig,
    train: CocoDataset,
    val: CocoDataset,
    state_path: Path,
    device: torch.device,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Predictor:
    """Train the network from random weights with this operator in both branches; the same seed gives every operator the
    same initial weights and the same pictures in the same order.

    Args:
        state_path: the run's state; an interrupted run resumes from it.
    """
    mask = config.roi.mask.model_copy(update={"op": None})
    config = config.model_copy(update={"roi": config.roi.model_copy(update={"op": roi_op, "mask": mask})})
    trainer = Trainer(
        model_config=config,
        train_config=train_config,
        train=train,
        val=val,
        state_path=state_path,
        device=device,
    )
    with locked(state_path.parent):
        best = trainer.run(on_step=on_step)
    return evaluation_predictor(config, best.weights, device)


def busy_note(load: float, cores: int) -> str | None:
    """A remark on times that were measured while other programs ran.

    Args:
        load: runnable threads on the machine before the comparison began, from `os.getloadavg`.
        cores: of the machine.
    """
    if load < 0.5 * cores:
        return None
    return f"the machine was busy when this began (load {load:.1f} on {cores} cores): the times are not to be compared"


def by_operator(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs grouped by operator, in order of first appearance."""
    return {op: [run for run in runs if run.roi_op == op] for op in dict.fromkeys(run.roi_op for run in runs)}


def table(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Rows of text under `COLUMNS`, boxes first: the mean over each operator's runs, and ± the standard deviation if
    there are several.
    """
    return [
        (op, kind, *_mean_figures([figures for name, figures in _rows(of_op) if name == kind]), _mean_time(of_op))
        for kind in dict(_rows(runs))
        for op, of_op in by_operator(runs).items()
    ]


def markdown(runs: Sequence[Run], *, title: str, command: str, remark: str | None = None) -> str:
    """The table as a Markdown page, with the command that made it.

    Args:
        remark: something that readers of the times should know.
    """
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *table(runs)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    note = f"{NOTE}. Several seeds: mean ± standard deviation. The time is the median of a picture alone."
    if remark is not None:
        note += f" {remark[0].upper()}{remark[1:]}."
    return "\n".join([f"# {title}", "", *lines, "", note, "", "```bash", command, "```", ""])


def _rows(runs: Sequence[Run]) -> Iterator[tuple[str, AveragePrecision]]:
    for run in runs:
        yield from run.evaluation.rows()


def _mean_figures(figures: Sequence[AveragePrecision]) -> tuple[str, ...]:
    return tuple(mean_and_spread([100 * getattr(one, name) for one in figures]) for name in FIGURES)


def _mean_time(runs: Sequence[Run]) -> str:
    return mean_and_spread([run.milliseconds_per_image for run in runs])
