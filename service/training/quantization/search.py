"""Which layers run in int8: all, less those that must be taken back for the loss of AP to stay within a bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from service.errors import ServiceError
from service.inference.engines.int8 import put_quantizers
from service.model_store.quantizers import PARTS, Part, Quantizers
from service.training.quantization.calibration import Array
from service.training.quantization.proposing import Proposal

Ap = Mapping[str, float]
"""Average precision of `boxes`, and of `masks` if there are any, 0 to 1."""
Plan = Mapping[Part, frozenset[str]]
"""The layers of each part that run in int8."""


class NothingLeftError(ServiceError):
    """The bound leaves no layer in int8."""


class Measures(Protocol):
    """What the search asks. Asking the same again costs nothing."""

    def ap(self, plan: Plan) -> Ap:
        """AP with these layers in int8, all others in float32."""

    def by_error(self, part: Part) -> Sequence[str]:
        """A part's layers, the one that disturbs the part's outputs most first."""


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search."""

    plan: Plan
    ap: Ap


def loss(before: Ap, after: Ap) -> float:
    """Points of AP lost, 0 to 100, by boxes or masks, whichever lose more."""
    return max(100 * (before[kind] - after[kind]) for kind in before)


def search(
    proposals: Mapping[Part, Proposal],
    before: Ap,
    measures: Measures,
    *,
    max_ap_loss: float,
    say: Callable[[str], None] = lambda line: None,
) -> Found:
    """Take layers back to float32 until the loss is within the bound: from the part that alone loses most, the worst
    layers first, twice as many every time.

    Args:
        proposals: all that could run in int8.
        before: AP in float32.
        measures: see there.
        max_ap_loss: in points of AP.
        say: gets a line for each step.

    Raises:
        NothingLeftError: nothing can stay in int8.
    """
    plan: dict[Part, frozenset[str]] = {
        part: frozenset(proposals[part].layers) for part in PARTS if proposals[part].layers
    }
    ranked: list[str] = []
    guilty: Part = "trunk"
    step = 1
    alone: dict[Part, float] = {}
    while any(plan.values()):
        ap = measures.ap(plan)
        lost = loss(before, ap)
        say(f"int8 in {told(plan)}: {lost:.2f} points of AP lost")
        if lost <= max_ap_loss:
            return Found(plan, ap)
        if not alone and len(plan) > 1:
            alone = {part: loss(before, measures.ap({part: layers})) for part, layers in plan.items()}
            for part, points in alone.items():
                say(f"  of which by the {_words(part)} alone: {points:.2f}")
        if not ranked:
            guilty = max((part for part in plan if plan[part]), key=lambda part: alone.get(part, 0.0))
            ranked, step = list(measures.by_error(guilty)), 1
        taken, ranked = ranked[:step], ranked[step:]
        plan[guilty] = plan[guilty] - set(taken)
        say(f"  back to float32 in the {_words(guilty)}: {', '.join(taken)}")
        step *= 2
    raise NothingLeftError(
        f"nothing can stay in int8: every layer that was left cost more than {max_ap_loss:g} points of AP; "
        "no version was written. A larger --max-ap-loss, or more --pictures, may help"
    )


def quantizers_of(proposals: Mapping[Part, Proposal], plan: Plan) -> Quantizers:
    """The quantisers of a plan."""
    return Quantizers(**{part: proposals[part].only(layers) for part, layers in plan.items()})


def ranked_by_error(
    proposal: Proposal, graph: Callable[[], Any], inputs: Sequence[tuple[Array, ...]], *, advance: Callable[[], None]
) -> Sequence[str]:
    """A part's layers by how far each of them, alone in int8, moves the part's outputs, the farthest first.

    Args:
        graph: makes the part's graph in float32.
        inputs: a few.
        advance: called after every layer.
    """
    expected = list(_outputs(graph(), inputs))
    errors: dict[str, float] = {}
    for layer in proposal.layers:
        rounded = graph()
        put_quantizers(rounded, proposal.only(frozenset([layer])))
        found = zip(_outputs(rounded, inputs), expected, strict=True)
        errors[layer] = float(np.mean([_relative_error(ours, theirs) for ours, theirs in found]))
        advance()
    return sorted(errors, key=lambda layer: -errors[layer])


def _outputs(graph: Any, inputs: Sequence[tuple[Array, ...]]) -> Iterator[Array]:
    import openvino

    compiled = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for one in inputs:
        found = compiled(list(one))
        yield from (np.array(found[output]) for output in compiled.outputs)


def _relative_error(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours - theirs) / max(float(np.linalg.norm(theirs)), 1e-9))


def told(plan: Plan) -> str:
    """A plan in words."""
    counts = {part: len(layers) for part, layers in plan.items() if layers}
    return ", ".join(f"{count} layers of the {_words(part)}" for part, count in counts.items()) or "nothing"


def _words(part: Part) -> str:
    return part.replace("_", " ")
