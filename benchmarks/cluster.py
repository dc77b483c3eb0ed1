"""What a Ray Serve cluster costs and what it brings: `python -m benchmarks.cluster`.

First, one detector replica behind Ray's HTTP proxy against `roiserve serve`, both on this machine with the same model,
taking turns. Then a simulation of many machines, for which there is none here: Poisson arrivals, service times as they
were measured, and our own autoscaling policy with the delays of real machines.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from benchmarks._detectors import BUNDLED, bundled_models
from benchmarks._measure import REPORTS, Cell, Report, spread
from benchmarks.serve import ONE_SIZE, free_port, load, running_server, traffic, until_ready
from service.cluster.scaling import QueuedPixels
from service.load.client import Target
from service.model_store.store import StoredModel

OVERHEAD = "One detector replica behind Ray's proxy against roiserve serve"
OVERHEAD_COLUMNS = ["model", "callers", "serve answers/s", "ray answers/s", "ratio", "serve p50 ms", "ray p50 ms"]
SIMULATED = "Simulated machines under load"
SIMULATED_COLUMNS = ["machines", "load", "offered/s", "p50 ms", "p99 ms", "busy"]
STEP = "Simulated step of load, with the autoscaler"
STEP_COLUMNS = [
    "second",
    "offered/s",
    "replicas wanted",
    "replicas ready",
    "waiting Mpx",
    "refused",
    "p99 ms of those done",
]
PIXELS = 800 * 1088  # of a picture of 640 x 480, resized and padded
PLACES = 72  # at a replica, as by default: max_queue_size + max_batch_size


def main(
    seconds: Annotated[float, typer.Option(help="How long each load lasts.")] = 5.0,
    rounds: Annotated[int, typer.Option(help="How often the two take turns.")] = 3,
    service_ms: Annotated[float, typer.Option(help="Mean time of a picture on a simulated machine.")] = 30.0,
    simulate_only: Annotated[bool, typer.Option(help="Leave out what needs Ray.")] = False,
    quick: Annotated[bool, typer.Option(help="A second each and few machines: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print what the proxy costs, and what many machines would do."""
    report = Report("cluster", out)
    if not simulate_only:
        compare(report, bundled_models()[0], seconds=1 if quick else seconds, rounds=1 if quick else rounds)
    simulate(report, machines=[1, 4] if quick else [1, 10, 100], service_seconds=service_ms / 1000, quick=quick)
    report.show()


def compare(report: Report, stored: StoredModel, *, seconds: float, rounds: int) -> None:
    """Both servers run at once, but only one has load at a time."""
    jpegs = traffic(stored.name, ONE_SIZE)
    rows: list[list[Cell]] = []
    with running_server([stored], workers="default") as alone, running_cluster([stored]) as spread_out:
        for target in (alone, spread_out):
            load(target, jpegs, callers=4, seconds=seconds)
        for callers in (1, 4, 16):
            summaries = [
                [load(target, jpegs, callers=callers, seconds=seconds) for target in (alone, spread_out)]
                for _ in range(rounds)
            ]
            rates = [[one.throughput_per_second for one in pair] for pair in summaries]
            latencies = [[one.latency_ms.get("p50", float("nan")) for one in pair] for pair in summaries]
            rows.append(
                [
                    stored.name,
                    callers,
                    *(spread([pair[side] for pair in rates]) for side in (0, 1)),
                    spread([ray / serve for serve, ray in rates]),
                    *(spread([pair[side] for pair in latencies]) for side in (0, 1)),
                ]
            )
            report.table(OVERHEAD, OVERHEAD_COLUMNS, rows)


@contextmanager
def running_cluster(models: Sequence[StoredModel]) -> Iterator[Target]:
    """A local Ray cluster that serves these models with one detector replica, by Ray's own command."""
    port = free_port()
    configuration = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "roiserve",
                "import_path": "service.cluster.application:build",
                "args": {
                    "model_store": str(BUNDLED),
                    "models": ",".join(one.key for one in models),
                    "log_level": "warning",
                },
            }
        ],
    }
    with TemporaryDirectory() as folder:
        path = Path(folder, "serve.yaml")
        path.write_text(json.dumps(configuration))  # JSON is YAML
        command = [str(Path(sys.executable).parent / "serve"), "run", str(path)]
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        with open(Path(folder, "log"), "wb") as log:
            server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            try:
                target = Target.of_url(f"http://127.0.0.1:{port}")
                asyncio.run(until_ready(target, server))
                yield target
            finally:
                server.send_signal(signal.SIGINT)
                server.wait(60)


@dataclass
class Cluster:
    """Replicas that each do one picture after another, and a router that asks two of them and takes the shorter queue,
    as Ray's does.

    Attributes:
        free_at: when each replica will have done all that waits at it.
        busy_seconds: of all of them together.
    """

    free_at: list[float]
    random: random.Random
    busy_seconds: float = 0.0

    def serve(self, now: float, service_seconds: float) -> float | None:
        """A picture comes; when its answer goes, or None if it is refused."""
        pair = self.random.sample(range(len(self.free_at)), min(2, len(self.free_at)))
        chosen = min(pair, key=lambda replica: self.free_at[replica])
        begin = max(now, self.free_at[chosen])
        if begin - now > PLACES * service_seconds:
            return None
        self.free_at[chosen] = begin + service_seconds
        self.busy_seconds += service_seconds
        return self.free_at[chosen]

    def waiting_seconds(self, now: float) -> float:
        """Of work, at all replicas together."""
        return sum(max(0.0, at - now) for at in self.free_at)


def simulate(report: Report, *, machines: Sequence[int], service_seconds: float, quick: bool) -> None:
    """Steady load on numbers of machines, then a step of load with the autoscaler."""
    rows: list[list[Cell]] = []
    for number in machines:
        for part in (0.5, 0.8, 0.95):
            rows.append(steady(number, part, service_seconds, requests=20_000 if quick else 200_000))
    report.table(SIMULATED, SIMULATED_COLUMNS, rows)
    report.table(STEP, STEP_COLUMNS, step(service_seconds, most=10 if quick else 100))


def steady(machines: int, part: float, service_seconds: float, *, requests: int) -> list[Cell]:
    """Poisson arrivals at a part of what the machines can do; a quarter of the time of a picture varies."""
    chance = random.Random(0)
    cluster = Cluster([0.0] * machines, chance)
    rate = part * machines / service_seconds
    now, latencies = 0.0, []
    for _ in range(requests):
        now += chance.expovariate(rate)
        at = cluster.serve(now, _service(chance, service_seconds))
        if at is not None:
            latencies.append(at - now)
    latencies.sort()
    quantiles = [1000 * latencies[int(part * len(latencies))] for part in (0.5, 0.99)]
    return [machines, f"{100 * part:.0f} %", rate, *quantiles, f"{100 * cluster.busy_seconds / now / machines:.0f} %"]


def step(service_seconds: float, *, most: int, start_seconds: float = 40.0) -> list[list[Cell]]:
    """Load for half a machine, then suddenly for two thirds of `most`: what the policy does, if a replica needs
    `start_seconds` from the decision to its first answer.
    """
    chance = random.Random(0)
    policy = QueuedPixels(target_pixels=4e6, downscale_delay_seconds=60)
    cluster = Cluster([0.0], chance)
    wanted, idle_since = 1, None
    starting: list[float] = []
    rows: list[list[Cell]] = []
    done: list[tuple[float, float]] = []
    offered = refused = 0
    for second in range(300):
        rate = (0.5 if second < 30 or second >= 240 else most * 2 / 3) / service_seconds
        now = float(second)
        while now < second + 1:
            now += chance.expovariate(rate)
            at = cluster.serve(now, _service(chance, service_seconds))
            offered += 1
            refused += at is None
            if at is not None:
                heapq.heappush(done, (at, at - now))
        now = second + 1.0
        waiting = cluster.waiting_seconds(now)
        wanted, idle_since = policy.wanted(
            waiting=max(0.0, waiting - len(cluster.free_at) * service_seconds) / service_seconds * PIXELS,
            ongoing=waiting / service_seconds,
            replicas=wanted,
            now=now,
            idle_since=idle_since,
        )
        wanted = min(most, wanted)
        starting += [now + start_seconds] * (wanted - len(cluster.free_at) - len(starting))
        ready = [at for at in starting if at <= now]
        starting = [at for at in starting if at > now]
        cluster.free_at += [now] * len(ready)
        if wanted < len(cluster.free_at):
            cluster.free_at = sorted(cluster.free_at, reverse=True)[:wanted]
        if second % 30 == 29:
            latencies = []
            while done and done[0][0] <= now:
                latencies.append(heapq.heappop(done)[1])
            latencies.sort()
            p99 = 1000 * latencies[int(0.99 * len(latencies))] if latencies else float("nan")
            pixels = waiting / service_seconds * PIXELS / 1e6
            refusals = f"{100 * refused / offered:.0f} %"
            rows.append([second + 1, rate, wanted, len(cluster.free_at), pixels, refusals, p99])
            offered = refused = 0
    return rows


def _service(chance: random.Random, mean_seconds: float) -> float:
    """The time of one picture: as long as the mean, give or take a quarter."""
    return mean_seconds * chance.uniform(0.75, 1.25)


if __name__ == "__main__":
    typer.run(main)
