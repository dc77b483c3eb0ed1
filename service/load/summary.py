"""The results of a load: every request with its times, and the figures computed from them. Times are in seconds since
the load began unless a name says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}

# The outcome that counts as a success.
OK = "200"


@dataclass(frozen=True, slots=True)
class Sample:
    """One request.

    Attributes:
        intended_at: when it should have been sent.
        sent_at: when it was sent: later if the client or its connections could not keep up.
        finished_at: when its answer was complete, or the client gave up.
        outcome: the status of the answer as text, or why there was none: `refused, closed, timeout, garbled`.
    """

    intended_at: float
    sent_at: float
    finished_at: float
    outcome: str

    @property
    def latency_seconds(self) -> float:
        """Latency from the intended start: a caller also waits while the request has not been sent."""
        return self.finished_at - self.intended_at


@dataclass(slots=True)
class Record:
    """The results so far. Grows while the load runs, and is kept if the load is interrupted.

    Attributes:
        in_flight: requests sent but not answered yet.
    """

    samples: list[Sample] = field(default_factory=list)
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a load.

    Attributes:
        seconds: from the first intended start to the last answer.
        requests: how many were answered or abandoned.
        outcomes: how many by outcome, see `Sample`.
        throughput_per_second: successful answers (200) per second.
        error_rate: share of requests with another outcome, 0 to 1.
        latency_ms: of the successful answers, from their intended starts, by the names of `PERCENTILES`; empty if none.
        lateness_ms: the 99th percentile of how late requests were sent; if far from 0, the client was the bottleneck.
    """

    seconds: float
    requests: int
    outcomes: Mapping[str, int]
    throughput_per_second: float
    error_rate: float
    latency_ms: Mapping[str, float]
    lateness_ms: float


def summarise(samples: Sequence[Sample], *, since: float = 0.0) -> Summary:
    """The figures of all samples whose intended start is at or after `since`."""
    counted = [sample for sample in samples if sample.intended_at >= since]
    wanted = [sample for sample in counted if sample.outcome == OK]
    first = min((sample.intended_at for sample in counted), default=0.0)
    seconds = max((sample.finished_at for sample in counted), default=0.0) - first
    latencies_ms = sorted(1000 * sample.latency_seconds for sample in wanted)
    lateness_ms = sorted(1000 * (sample.sent_at - sample.intended_at) for sample in counted)
    return Summary(
        seconds=seconds,
        requests=len(counted),
        outcomes=dict(sorted(Counter(sample.outcome for sample in counted).items())),
        throughput_per_second=len(wanted) / seconds if seconds > 0 else 0.0,
        error_rate=1 - len(wanted) / len(counted) if counted else 0.0,
        latency_ms={name: percentile(latencies_ms, part) for name, part in PERCENTILES.items()} if wanted else {},
        lateness_ms=percentile(lateness_ms, 0.99) if counted else 0.0,
    )


def percentile(rising: Sequence[float], part: float) -> float:
    """The smallest of the sorted numbers such that at least this share (0 to 1) of them is no larger."""
    rank = -int(-part * len(rising) // 1)  # rounded up
    return rising[max(rank, 1) - 1]
