"""The running server: how long it takes to start, and how it does under load, against the same pipeline called in
process: `python -m benchmarks.serve`.

The load comes from `service/load`, in this process, where nothing else runs meanwhile; what it takes of the processor
is in the table. While the pipeline is called in process, the server is idle.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from types import MappingProxyType
from typing import Annotated

import orjson
import torch
import typer

from benchmarks._answers import OurService
from benchmarks._detectors import BUNDLED, as_jpeg, bundled_models, example_picture, our_predictor, picture_for
from benchmarks._measure import REPORTS, Cell, Report, alternate, milliseconds, spread
from service.load.client import Client, NoAnswerError, Target
from service.load.generators import closed_loop
from service.load.pictures import endless
from service.load.summary import Record, Summary, summarise
from service.model_store.store import StoredModel

ONE_SIZE = ((640, 480),)
MIXED_SIZES = ((640, 480), (480, 640), (800, 600), (512, 512), (1024, 768), (320, 240), (1280, 720), (600, 400))
TRAFFIC = {"one size": ONE_SIZE, "mixed sizes": MIXED_SIZES}
BATCH_SIZES = (1, 2, 4, 8)
SECONDS_TO_START = 120
STARTS = "From the command to ready, all bundled models"
START_COLUMNS = ["start", "workers", "seconds"]
LOADS = "Closed loops"
LOAD_COLUMNS = [
    "model",
    "traffic",
    "workers",
    "callers",
    "answers/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "errors",
    "load generator's CPU ms/answer",
]
SATURATED = "Saturated server against the pipeline in process"
RATIO_COLUMNS = [
    "model",
    "traffic",
    "workers",
    "engine",
    "in process images/s",
    "best batch",
    "server images/s",
    "callers",
    "server / in process",
]
AT_REST = "One request at a time"
IDLE_COLUMNS = ["model", "workers", "engine", "in process ms", "one caller ms", "bound ms (1.05 x + 5)", "within"]


def main(
    seconds: Annotated[float, typer.Option(help="How long each load lasts.")] = 3.0,
    rounds: Annotated[int, typer.Option(help="How often the server and the process take turns.")] = 3,
    callers: Annotated[str, typer.Option(help="Concurrencies, separated by commas; the last one saturates.")] = (
        "1,4,16"
    ),
    workers: Annotated[str, typer.Option(help="Of `roiserve serve`, separated by commas; 'default' sets nothing.")] = (
        "default,0"
    ),
    threads: Annotated[int, typer.Option(help="For torch in this process; the server takes its own default.")] = 2,
    quick: Annotated[bool, typer.Option(help="One model, half a second each: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print tables of starts, of loads, of throughput against the process's, and of the idle server's answers."""
    torch.set_num_threads(threads)
    bench = _Bench(
        Report("serve", out),
        seconds=0.5 if quick else seconds,
        rounds=1 if quick else rounds,
        callers=[1, 2] if quick else [int(one) for one in callers.split(",")],
    )
    if not quick:
        bench.start(workers.split(",")[0])
    for stored in bundled_models()[:1] if quick else bundled_models():
        for number in ["default"] if quick else workers.split(","):
            with running_server([stored], workers=number) as target:
                bench.measure(stored, number, target)
    bench.report.show()


@contextmanager
def running_server(
    models: Sequence[StoredModel], *, workers: str, environment: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Target]:
    """`roiserve serve` with these models, ready; stopped afterwards."""
    settings = {"ROISERVE_MODEL_STORE": str(BUNDLED), "ROISERVE_MODELS": ",".join(one.key for one in models)}
    if workers != "default":
        settings["ROISERVE_WORKERS"] = workers
    with running(["-m", "service", "serve"], {**settings, **environment}) as (target, _):
        yield target


@contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[tuple[Target, int]]:
    """A server that Python runs with these arguments, ready, and its process id; stopped afterwards."""
    port = free_port()
    settings = {"ROISERVE_PORT": str(port), "ROISERVE_LOG_LEVEL": "warning"}
    with TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, *arguments], env={**os.environ, **settings, **environment}, stdout=log, stderr=log
        )
        try:
            target = Target.of_url(f"http://127.0.0.1:{port}")
            asyncio.run(until_ready(target, server))
            yield target, server.pid
        except Exception:
            log.seek(0)
            sys.stderr.buffer.write(log.read())
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


async def until_ready(target: Target, server: subprocess.Popen[bytes]) -> None:
    request = target.request("GET", "/readyz")
    async with asyncio.timeout(SECONDS_TO_START), Client(target) as client:
        while True:
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with {server.returncode}")
            try:
                if (await client.send(request)).status == 200:
                    return
            except NoAnswerError:
                pass
            await asyncio.sleep(0.1)


def caches_in(folder: Path) -> dict[str, str]:
    """The variables that have a server keep all that it compiles in this folder."""
    return {"ROISERVE_ENGINE_CACHE_DIR": str(folder / "engine"), "NUMBA_CACHE_DIR": str(folder / "numba")}


def seconds_to_start(models: Sequence[StoredModel], *, workers: str, environment: Mapping[str, str]) -> float:
    """From the command until `/readyz` says 200, to a tenth of a second."""
    begin = time.perf_counter()
    with running_server(models, workers=workers, environment=environment):
        return time.perf_counter() - begin


def traffic(model: str, sizes: Sequence[tuple[int, int]]) -> list[bytes]:
    """Eight JPEGs of these sizes, no two alike."""
    picture = example_picture(1280, 960, name=picture_for(model))
    jpegs = []
    for index, size in zip(range(8), itertools.cycle(sizes), strict=False):
        shift = 16 * index
        jpegs.append(as_jpeg(picture.crop((shift, shift, 1280, 960)).resize(size)))
    return jpegs


def load(target: Target, jpegs: Sequence[bytes], *, callers: int, seconds: float, path: str = "/v1/detect") -> Summary:
    """A closed loop of so many callers."""
    requests = [target.request("POST", path, headers={"Content-Type": "image/jpeg"}, body=jpeg) for jpeg in jpegs]
    order = endless(requests, seed=0)

    async def run() -> Record:
        record = Record()
        async with Client(target) as client:

            async def send() -> int:
                return (await client.send(next(order))).status

            await closed_loop(send, record, concurrency=callers, seconds=seconds)
        return record

    return summarise(asyncio.run(run()).samples)


def throughput(service: OurService, jpegs: Sequence[bytes], *, batch: int, seconds: float) -> float:
    """Pictures a second of the pipeline in this process."""
    order = endless(jpegs, seed=0)
    done = 0
    begin = time.perf_counter()
    while (now := time.perf_counter()) < begin + seconds:
        done += len(service.answer(list(itertools.islice(order, batch))))
    return done / (now - begin)


class _Bench:
    """Fills the tables, server by server."""

    def __init__(self, report: Report, *, seconds: float, rounds: int, callers: Sequence[int]) -> None:
        self.report = report
        self._seconds = seconds
        self._rounds = rounds
        self._callers = callers
        self._loads: list[list[Cell]] = []
        self._ratios: list[list[Cell]] = []
        self._idle: list[list[Cell]] = []

    def start(self, workers: str) -> None:
        """The first start, which compiles everything, and later ones, which find it compiled."""
        with TemporaryDirectory() as folder:
            seconds = [
                seconds_to_start(bundled_models(), workers=workers, environment=caches_in(Path(folder)))
                for _ in range(1 + self._rounds)
            ]
        rows: list[list[Cell]] = [["first", workers, seconds[0]], ["later ones", workers, spread(seconds[1:])]]
        self.report.table(STARTS, START_COLUMNS, rows)

    def measure(self, stored: StoredModel, workers: str, target: Target) -> None:
        predictor = our_predictor(stored, engine_of(target))
        service = OurService(predictor)
        for name, sizes in TRAFFIC.items():
            jpegs = traffic(stored.name, sizes)
            load(target, jpegs, callers=self._callers[-1], seconds=self._seconds)  # what is done once is done now
            service.answer(jpegs)
            head: list[Cell] = [stored.name, name, workers]
            saturated = self._under_load(head, target, jpegs)
            self._against_process(head, target, jpegs, service, predictor.info.engine, saturated)
            if name == "one size":
                self._at_rest([stored.name, workers, predictor.info.engine], target, jpegs, service)
            print(f"measured {stored.name}, {name}, workers {workers}", flush=True)

    def _under_load(self, head: Sequence[Cell], target: Target, jpegs: Sequence[bytes]) -> int:
        """Returns how many callers bring the most."""
        rates: dict[int, float] = {}
        for callers in self._callers:
            begin = time.process_time()
            summary = load(target, jpegs, callers=callers, seconds=self._seconds)
            cpu_ms = 1e3 * (time.process_time() - begin) / summary.requests
            rates[callers] = summary.throughput_per_second
            latencies = [summary.latency_ms.get(name, float("nan")) for name in ("p50", "p95", "p99")]
            errors = f"{100 * summary.error_rate:.1f} %"
            self._loads.append([*head, callers, summary.throughput_per_second, *latencies, errors, cpu_ms])
            self.report.table(LOADS, LOAD_COLUMNS, self._loads)
        return max(rates, key=lambda callers: rates[callers])

    def _against_process(
        self,
        head: Sequence[Cell],
        target: Target,
        jpegs: Sequence[bytes],
        service: OurService,
        engine: str,
        callers: int,
    ) -> None:
        tried = {batch: throughput(service, jpegs, batch=batch, seconds=self._seconds / 2) for batch in BATCH_SIZES}
        batch = max(tried, key=lambda size: tried[size])
        ours, server = [], []
        for _ in range(self._rounds):
            ours.append(throughput(service, jpegs, batch=batch, seconds=self._seconds))
            server.append(load(target, jpegs, callers=callers, seconds=self._seconds).throughput_per_second)
        ratios = spread([a / b for a, b in zip(server, ours, strict=True)])
        self._ratios.append([*head, engine, spread(ours), batch, spread(server), callers, ratios])
        self.report.table(SATURATED, RATIO_COLUMNS, self._ratios)

    def _at_rest(self, head: Sequence[Cell], target: Target, jpegs: Sequence[bytes], service: OurService) -> None:
        request = target.request("POST", "/v1/detect", headers={"Content-Type": "image/jpeg"}, body=jpegs[0])
        with asyncio.Runner() as runner:
            client = Client(target)
            sides = {
                "server": lambda: runner.run(client.send(request)),
                "process": lambda: service.answer(jpegs[:1]),
            }
            seconds = alternate(sides, rounds=10 * self._rounds, most_seconds=4 * self._seconds)
            runner.run(client.__aexit__(None, None, None))
        ours, server = milliseconds(seconds["process"]), milliseconds(seconds["server"])
        bound = 1.05 * ours.median + 5
        self._idle.append([*head, ours, server, bound, "yes" if server.median <= bound else "no"])
        self.report.table(AT_REST, IDLE_COLUMNS, self._idle)


def engine_of(target: Target) -> str:
    """The engine that the server chose."""

    async def ask() -> bytes:
        async with Client(target) as client:
            return (await client.send(target.request("GET", "/v1/models"))).body

    engine: str = orjson.loads(asyncio.run(ask()))["models"][0]["engine"]
    return engine


if __name__ == "__main__":
    typer.run(main)
