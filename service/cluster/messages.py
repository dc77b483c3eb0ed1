"""Messages between ingress and detector replicas. Both ends run this program and Ray serializes for them, so these are
plain data classes. `time.monotonic` differs between machines, so deadlines are sent as remaining seconds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from service.metrics import Observation
from service.structures import Answer, Job, ModelInfo, Progress
from service.workers.channel import Header


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """A snapshot of a detector replica.

    Attributes:
        replica: its id in the cluster.
        capacity: jobs of each priority that it accepts at a time.
        models: the models it serves.
        waiting_pixels: by model, the resized and padded pixels of each image that waits for its devices.
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
        job: its deadline is meaningless on the other machine.
        request_id: for the replica's log.
        seconds_left: until the caller stops waiting.
    """

    job: Job
    request_id: str
    seconds_left: float

    @classmethod
    def of(cls, job: Job, request_id: str) -> Request:
        """Pack a job for sending now."""
        return cls(job, request_id, job.deadline - time.monotonic())

    def unpacked(self) -> Job:
        """The job on this machine's clock, with times starting now."""
        deadline = time.monotonic() + self.seconds_left
        return replace(self.job, deadline=deadline, progress=Progress("received", trace_id=self.job.progress.trace_id))


@dataclass(frozen=True, slots=True, eq=False)
class Reply:
    """The result of a job.

    Attributes:
        outcome: the answer, or an error serialized by `workers.channel.error_to`.
        stage_seconds: of the job, by stage.
        observations: for the metrics, from this and other jobs.
        state: of the replica.
    """

    outcome: Answer | Header
    stage_seconds: Mapping[str, float]
    observations: Sequence[Observation]
    state: State
