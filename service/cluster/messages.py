"""What ingress and detector replicas say to each other. Ray serializes both ends of our own program, so these are plain
data classes; `time.monotonic` differs between machines, so deadlines travel as the seconds that remain.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from service.metrics import Observed
from service.structures import Answer, Job, ModelInfo, Progress
from service.workers.channel import Header

Observation = tuple[Observed, Sequence[str], float]


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A detector replica at one moment.

    Attributes:
        replica: its id in the cluster.
        capacity: jobs of each priority that it takes at a time.
        models: what it serves.
        waiting_pixels: of each image that waits for its devices, the pixels, resized and padded, by model.
        memory: bytes by device and kind.
    """

    replica: str
    capacity: int
    models: Sequence[ModelInfo]
    waiting_pixels: Mapping[str, Sequence[int]]
    memory: Mapping[tuple[str, str], float]


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A job on its way to a replica.

    Attributes:
        job: with a deadline that means nothing there.
        request_id: for the replica's log.
        seconds_left: until the caller no longer waits.
    """

    job: Job
    request_id: str
    seconds_left: float

    @classmethod
    def of(cls, job: Job, request_id: str) -> Request:
        """Pack a job now."""
        return cls(job, request_id, job.deadline - time.monotonic())

    def unpacked(self) -> Job:
        """The job on this machine's clock, with times that begin now."""
        deadline = time.monotonic() + self.seconds_left
        return replace(self.job, deadline=deadline, progress=Progress("received"))


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """What came of a job.

    Attributes:
        outcome: the answer, or an error as `workers.channel.error_to` writes it.
        stage_seconds: of the job, by stage.
        observations: for the metrics, of this and of other jobs.
        state: of the replica.
    """

    outcome: Answer | Header
    stage_seconds: Mapping[str, float]
    observations: Sequence[Observation]
    state: State
