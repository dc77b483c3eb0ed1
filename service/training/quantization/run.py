"""A whole run: record, propose, measure, search, write the version."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from service.inference.engines.openvino import OpenVinoNetwork, has_bfloat16
from service.model_store.model_toml import Figure, Int8Table, Int8Tolerances, ProvenanceTable
from service.model_store.quantizers import PARTS, Part, Quantizers
from service.model_store.store import ModelStore, StoredModel
from service.structures import Verification
from service.training.dataset import CocoDataset
from service.training.evaluation import Evaluation, evaluate
from service.training.export import figures_of
from service.training.quantization.calibration import Array, Recording, chosen_samples, pictures_sha256, record
from service.training.quantization.proposing import Proposal, check_installed, propose
from service.training.quantization.report import card
from service.training.quantization.search import Ap, Plan, quantizers_of, ranked_by_error, search
from service.training.quantization.state import State
from service.training.quantization.workbench import NONE, Workbench

_RANKED_INPUTS = 4
_MARGIN = 1.5
"""Times the difference that was measured here: other processors round a little differently."""
_LEAST_TOLERANCES = {"boxes": 0.1, "scores": 0.005, "masks": 0.005}
_PACKAGES = ("nncf", "openvino", "torch", "torchvision")

Stage = Callable[[str, int], Callable[[], None]]
"""Begins a stage of so many steps; what it returns is called after each."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a run wrote.

    Attributes:
        ap: by precision.
    """

    stored: StoredModel
    table: Int8Table
    ap: Mapping[str, Ap]


def run_folder(store: ModelStore, stored: StoredModel) -> Path:
    """Where a run keeps what it has found so far; the store ignores it."""
    return store.root / stored.name / f".quantizing-{store.next_version(stored.name)}"


class Run:
    """One run.

    Args:
        store: where the version is written.
        stored: the model, in float32.
        train: its pictures calibrate.
        val: what AP is measured on.
        pictures: how many pictures calibrate, at most.
        stage: see `Stage`.
        say: gets lines for people.

    Raises:
        ServiceError: NNCF is not installed, or the model cannot be quantised.
        ModelStoreError: the model is broken, or the store cannot be written.
    """

    def __init__(
        self,
        store: ModelStore,
        stored: StoredModel,
        *,
        train: CocoDataset,
        val: CocoDataset,
        pictures: int,
        stage: Stage = lambda name, steps: lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_installed()
        self._store = store
        self.version = store.next_version(stored.name)
        folder = run_folder(store, stored)
        self._bench = Workbench(stored, cache_dir=folder / "compiled")
        self._samples = chosen_samples(train, pictures)
        self._val = val
        self._stage, self._say = stage, say
        made_of = (
            stored.key,
            stored.model_toml.model_dump_json(),
            pictures_sha256(self._samples),
            val.fingerprint,
            [version(name) for name in _PACKAGES],
        )
        self.state = State(folder, made_of)
        self._proposals: dict[Part, Proposal] = {}
        self._graphs: OpenVinoNetwork | None = None
        self._evaluations: dict[str, Evaluation] = {}

    def write(self, *, max_ap_loss: float, command: str) -> Written:
        """Go through all stages, and write the next version of the model.

        Args:
            max_ap_loss: in points of AP.
            command: the command line, for the card.

        Raises:
            NothingLeftError: nothing can stay in int8; nothing is written.
        """
        self._record()
        for part in PARTS:
            self._proposals[part] = self._propose(part)
        figures: dict[str, Ap] = {"float32": self._ap("float32", NONE)}
        if has_bfloat16():
            figures["bfloat16"] = self._ap("bfloat16", NONE)
        for precision, ap in figures.items():
            self._say(f"{precision}: {_told(ap)}")
        found = search(self._proposals, figures["float32"], self, max_ap_loss=max_ap_loss, say=self._say)
        figures["int8"] = found.ap
        quantizers = quantizers_of(self._proposals, found.plan)
        # The same weights, run as a version of which nothing runs in int8.
        figures["float32 with the weights of int8"] = self._ap("float32", quantizers)
        self._say(f"int8: {_told(found.ap)}")
        return self._written(found.plan, quantizers, figures, command)

    # -- what the search asks

    def ap(self, plan: Plan) -> Ap:
        """See `Measures`."""
        return self._ap("int8", quantizers_of(self._proposals, plan))

    def by_error(self, part: Part) -> Sequence[str]:
        """See `Measures`."""
        name = f"ranking of {part}"
        ranked: list[str] | None = self.state.get(name)
        if ranked is None:
            proposal = self._proposals[part]
            inputs = list(islice(self._calls(part), _RANKED_INPUTS))
            advance = self._stage(f"layers of the {part.replace('_', ' ')}", len(proposal.layers))
            ranked = list(ranked_by_error(proposal, lambda: self._graph(part), inputs, advance=advance))
            self.state.put(name, ranked)
        return ranked

    # -- stages

    @property
    def _recorded(self) -> Path:
        return self.state.folder / "recorded.safetensors"

    def _record(self) -> None:
        if self.state.get("recorded"):
            return
        model = self._bench.network()
        predictor = self._bench.predictor_of(model, "float32", NONE)
        advance = self._stage("recording", len(self._samples))
        record(predictor, model, self._samples, self._recorded, advance=advance)
        self.state.put("recorded", True)

    def _propose(self, part: Part) -> Proposal:
        name = f"proposal for {part}"
        known = self.state.get(name)
        if known is not None:
            return Proposal.model_validate(known)
        if part == "mask_head" and not self._bench.config.has_masks:
            return Proposal()
        count = sum(1 for _ in self._calls(part)) if part != "trunk" else len(self._samples)
        advance = self._stage(f"calibrating the {part.replace('_', ' ')}", count)
        proposal = propose(
            part,
            self._graph(part),
            lambda: self._calls(part),
            count=count,
            state=self._bench.weights,
            advance=advance,
        )
        self.state.put(name, proposal.model_dump())
        return proposal

    def _calls(self, part: Part) -> Iterator[tuple[Array, ...]]:
        return Recording(self._bench.config.transform, self._samples, self._recorded).of(part)

    def _graph(self, part: Part) -> object:
        if self._graphs is None:
            self._graphs = self._bench.graphs()
        return self._graphs.graph(part)

    def _ap(self, precision: str, quantizers: Quantizers) -> Ap:
        name = f"AP in {precision} by {quantizers.sha256}"
        known: Ap | None = self.state.get(name)
        if known is None:
            predictor = self._bench.predictor(precision, quantizers)
            evaluation = evaluate(predictor, self._val, advance=self._stage(f"AP in {precision}", len(self._val)))
            self.state.put(f"figures of {name}", {kind: figures_of(figures) for kind, figures in evaluation.rows()})
            # NaN, where there are no objects, loses nothing.
            known = {kind: 0.0 if math.isnan(one.ap) else round(one.ap, 6) for kind, one in evaluation.rows()}
            self.state.put(name, known)
        return known

    def _written(self, plan: Plan, quantizers: Quantizers, figures: Mapping[str, Ap], command: str) -> Written:
        bench, stored = self._bench, self._bench.stored
        table = Int8Table(
            sha256=quantizers.sha256,
            parts=tuple(part for part in PARTS if plan.get(part)),
            kept_float=tuple(
                layer
                for part in PARTS
                if plan.get(part)
                for layer in self._proposals[part].layers
                if layer not in plan[part]
            ),
            pictures=len(self._samples),
            pictures_sha256=pictures_sha256(self._samples),
            nncf=version("nncf"),
            tolerances=_tolerances(bench.differences(quantizers)),
            ap={precision: dict(ap) for precision, ap in figures.items()},
        )
        metrics: dict[str, Figure | dict[str, Figure]] = self.state.get(f"figures of AP in int8 by {quantizers.sha256}")
        given = bench.config.provenance
        provenance = ProvenanceTable(
            data=given.data,
            licence=given.licence,
            attribution=given.attribution,
            command=command,
            created=datetime.date.today(),
            software={name: version(name) for name in _PACKAGES},
            metrics=metrics,
            notes=f"{stored.key} quantised to int8",
        )
        written = self._store.write_model(
            stored.name,
            self.version,
            config=bench.config,
            state_dict=bench.weights,
            dtype=bench.config.weights.dtype,
            provenance=provenance,
            readme=card(stored, table, provenance, val_pictures=len(self._val)),
            int8=(table, quantizers),
        )
        self.state.remove()
        return Written(written, table, figures)


def _tolerances(differences: Verification) -> Int8Tolerances:
    measured = {
        name: max(_LEAST_TOLERANCES[name], float(f"{_MARGIN * value.difference:.2g}"))
        for name, value in differences.values.items()
    }
    return Int8Tolerances(**_LEAST_TOLERANCES | measured)


def _told(ap: Ap) -> str:
    return ", ".join(f"AP of {kind} {100 * value:.2f}" for kind, value in ap.items())
