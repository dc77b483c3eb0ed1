"""RoIServe beside other servers with the same weights: `python -m benchmarks.peers`.

Plain FastAPI, LitServe, mosec and Ray Serve (`benchmarks/_peer_servers.py`) and `roiserve serve` all run at once, and
one after the other gets the same load: photographs of mixed sizes, from one caller and from eight. All must find the
same objects. The others need an environment of their own, once: `python -m benchmarks.peers --set-up`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import orjson
import typer
from pycocotools import mask as coco

from benchmarks._detectors import BUNDLED
from benchmarks._measure import REPORTS, Cell, Report, markdown, spread
from benchmarks.serve import MIXED_SIZES, free_port, running_server, traffic
from service.load.client import Client, NoAnswerError, Target
from service.load.generators import closed_loop
from service.load.pictures import endless
from service.load.summary import Record, Summary, summarise
from service.model_store.store import ModelStore

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".tools/peers"
REQUIREMENTS = ROOT / "benchmarks/peers_requirements.txt"
NAMES = {"fastapi": "FastAPI", "litserve": "LitServe", "mosec": "mosec", "ray": "Ray Serve"}
SECONDS_TO_START = 180
SIDES = "The same weights behind other servers"
SIDE_COLUMNS = ["server", "batching", "callers", "answers/s", "p50 ms", "p95 ms", "errors", "ours / this"]
RATIOS = "Against the best of the others"
RATIO_COLUMNS = ["ours", "callers", "best of the others", "ours answers/s", "theirs answers/s", "ratio"]
AGREEMENT = "The same objects, one picture at a time"
AGREEMENT_COLUMNS = ["server", "objects (ours, theirs)", "largest box difference, pixels", "smallest mask IoU"]
# Below this a detection may fall on either side of a threshold.
CERTAIN_SCORE = 0.5
MOST_PIXELS = 1.0


@dataclass(frozen=True)
class Side:
    """A server that runs.

    Attributes:
        name: as the tables say it.
        is_ours: whether it is RoIServe.
        requests: whole HTTP requests, one for each picture.
        process: of the others.
    """

    name: str
    batching: str
    is_ours: bool
    target: Target
    requests: Sequence[bytes]
    process: subprocess.Popen[bytes] | None = None


def main(
    model: Annotated[str, typer.Option(help="NAME@VERSION of the bundled store, in float32: what all servers run.")] = (
        "nuclei@1"
    ),
    ours: Annotated[
        str, typer.Option(help="Further versions that ours serves, separated by commas, such as nuclei@2 in int8.")
    ] = "",
    callers: Annotated[str, typer.Option(help="Concurrencies, separated by commas.")] = "1,8",
    seconds: Annotated[float, typer.Option(help="How long each load lasts.")] = 5.0,
    rounds: Annotated[int, typer.Option(help="How often the sides take turns.")] = 3,
    most_seconds: Annotated[float, typer.Option(help="No further round begins that would go beyond this.")] = 400.0,
    max_batch_size: Annotated[int, typer.Option(help="Of the servers that batch.")] = 8,
    max_wait_ms: Annotated[int, typer.Option(help="How long they wait for a batch; mosec's and Ray's default.")] = 10,
    peers: Annotated[str, typer.Option(help="Which of the others, separated by commas.")] = ",".join(NAMES),
    set_up: Annotated[bool, typer.Option("--set-up", help="Make the others' environment, and end.")] = False,
    quick: Annotated[bool, typer.Option(help="Half a second each, once, by one caller and two: does it run?")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = REPORTS,
) -> None:
    """Print the throughput of each server, and ours against the best of the others."""
    if set_up:
        make_environment()
        return
    if not python().exists():
        print("skipped: the other servers are not installed; python -m benchmarks.peers --set-up installs them")
        return
    begin = time.monotonic()
    report = Report("peers", out)
    jpegs = traffic(model.partition("@")[0], MIXED_SIZES)[: 2 if quick else None]
    batching = {"MAX_BATCH_SIZE": str(max_batch_size), "MAX_WAIT_MS": str(max_wait_ms)}
    with ExitStack() as stack:
        sides = [stack.enter_context(our_side(key, jpegs)) for key in [model, *filter(None, ours.split(","))]]
        others = [stack.enter_context(peer_side(name, model, batching, jpegs)) for name in peers.split(",")]
        for side in others:
            asyncio.run(until_answering(side))
        sides += others
        print(f"all servers are ready after {time.monotonic() - begin:.0f} s", flush=True)
        report.table(AGREEMENT, AGREEMENT_COLUMNS, compare_answers(sides))
        concurrencies = [1, 2] if quick else [int(one) for one in callers.split(",")]
        bench = _Bench(report, sides, concurrencies, seconds=0.5 if quick else seconds)
        for side in sides:
            load(side, callers=2, seconds=0.5 if quick else 2)
        bench.run(1 if quick else rounds, ends_at=begin + most_seconds)
    report.show()
    print(bench.as_markdown())


def python() -> Path:
    """The interpreter of the others' environment."""
    return ENVIRONMENT / "bin/python"


def make_environment() -> None:
    """Install the others without changing a package of ours: what is installed here is seen from there."""
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    here = Path(sysconfig.get_path("purelib"))
    there = ENVIRONMENT / here.relative_to(sys.prefix)
    # The packages of this environment, and of those that it reads itself.
    folders = [here, *(line for file in sorted(here.glob("*.pth")) for line in _folders(file))]
    (there / "ours.pth").write_text("".join(f"{folder}\n" for folder in folders))
    flags = ["--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([str(python()), "-m", "pip", "install", *flags, "--requirement", str(REQUIREMENTS)], check=True)


def _folders(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith("/") and line != str(ROOT)]


@contextmanager
def our_side(key: str, jpegs: Sequence[bytes]) -> Iterator[Side]:
    with running_server([ModelStore(BUNDLED).find(key)], workers="default") as target:
        requests = [
            target.request("POST", "/v1/detect", headers={"Content-Type": "image/jpeg"}, body=jpeg) for jpeg in jpegs
        ]
        yield Side(f"RoIServe, {key}", "its own", True, target, requests)


@contextmanager
def peer_side(name: str, model: str, batching: Mapping[str, str], jpegs: Sequence[bytes]) -> Iterator[Side]:
    """One of the others, which has begun to start; stopped afterwards, with all its processes."""
    port = free_port()
    environment = {**os.environ, "MODEL": model, "PORT": str(port), **batching}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    with TemporaryFile() as log:
        server = subprocess.Popen(
            [str(python()), "-m", "benchmarks._peer_servers", name],
            env=environment,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            target = Target.of_url(f"http://127.0.0.1:{port}")
            requests = [_peer_request(name, target, jpeg) for jpeg in jpegs]
            words = "none" if name == "fastapi" else f"{batching['MAX_BATCH_SIZE']}, {batching['MAX_WAIT_MS']} ms"
            yield Side(NAMES[name], words, False, target, requests, server)
        except Exception:
            log.seek(0)
            print(f"== {name}: {log.read()[-4000:].decode(errors='replace')}", file=sys.stderr)
            raise
        finally:
            server.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                server.wait(30)
            with suppress(ProcessLookupError):  # what it has left behind, of its session
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _peer_request(name: str, target: Target, jpeg: bytes) -> bytes:
    kind, body = "image/jpeg", jpeg
    if name == "litserve":
        kind, body = "application/json", json.dumps({"image": base64.b64encode(jpeg).decode()}).encode()
    return target.request("POST", "/detect", headers={"Content-Type": kind}, body=body)


async def until_answering(side: Side) -> None:
    """Wait for the first answer."""
    async with asyncio.timeout(SECONDS_TO_START), Client(side.target) as client:
        while True:
            with suppress(NoAnswerError):
                if (await client.send(side.requests[0])).status == 200:
                    return
            if side.process is not None and side.process.poll() is not None:
                raise RuntimeError(f"{side.name} ended with {side.process.returncode}")
            await asyncio.sleep(0.5)


def load(side: Side, *, callers: int, seconds: float) -> Summary:
    """A closed loop of so many callers."""
    order = endless(side.requests, seed=0)

    async def run() -> Record:
        record = Record()
        async with Client(side.target, timeout_seconds=300) as client:

            async def send() -> int:
                return (await client.send(next(order))).status

            await closed_loop(send, record, concurrency=callers, seconds=seconds)
        return record

    return summarise(asyncio.run(run()).samples)


class _Bench:
    """Fills the tables, round by round."""

    def __init__(self, report: Report, sides: Sequence[Side], callers: Sequence[int], *, seconds: float) -> None:
        self._report = report
        self._sides = sides
        self._callers = callers
        self._seconds = seconds
        self._found: dict[tuple[str, int], list[Summary]] = {}

    def run(self, rounds: int, *, ends_at: float) -> None:
        for done in range(1, rounds + 1):
            begin = time.monotonic()
            for callers in self._callers:
                for side in self._sides:
                    summary = load(side, callers=callers, seconds=self._seconds)
                    self._found.setdefault((side.name, callers), []).append(summary)
            self._report.table(SIDES, SIDE_COLUMNS, self._side_rows())
            self._report.table(RATIOS, RATIO_COLUMNS, self._ratio_rows())
            took = time.monotonic() - begin
            print(f"round {done} of {rounds} took {took:.0f} s", flush=True)
            if time.monotonic() + took > ends_at:
                break

    def as_markdown(self) -> str:
        """The tables as docs/benchmarks.md has them."""
        tables = [(SIDES, SIDE_COLUMNS, self._side_rows()), (RATIOS, RATIO_COLUMNS, self._ratio_rows())]
        return "\n".join(markdown(*table) for table in tables)

    def _rates(self, side: Side, callers: int) -> list[float]:
        return [one.throughput_per_second for one in self._found[side.name, callers]]

    def _side_rows(self) -> list[list[Cell]]:
        rows: list[list[Cell]] = []
        for callers in self._callers:
            first = self._rates(self._sides[0], callers)
            for side in self._sides:
                summaries, rates = self._found[side.name, callers], self._rates(side, callers)
                latencies = [statistics.median(_latency(one, name) for one in summaries) for name in ("p50", "p95")]
                errors = f"{100 * statistics.mean(one.error_rate for one in summaries):.1f} %"
                ratio = spread(_ratios(first, rates))
                rows.append([side.name, side.batching, callers, spread(rates), *latencies, errors, ratio])
        return rows

    def _ratio_rows(self) -> list[list[Cell]]:
        rows: list[list[Cell]] = []
        others = [side for side in self._sides if not side.is_ours]
        for callers in self._callers:
            medians = [statistics.median(self._rates(side, callers)) for side in others]
            best = others[medians.index(max(medians))]
            theirs = self._rates(best, callers)
            for side in self._sides:
                if side.is_ours:
                    own = self._rates(side, callers)
                    ratio = spread(_ratios(own, theirs))
                    rows.append([side.name, callers, best.name, spread(own), spread(theirs), ratio])
        return rows


def _ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a / b if b else float("inf") for a, b in zip(one, other, strict=True)]


def _latency(summary: Summary, name: str) -> float:
    return summary.latency_ms.get(name, float("nan"))


def compare_answers(sides: Sequence[Side]) -> list[list[Cell]]:
    """A row for each side but the first, which they are compared with.

    Raises:
        RuntimeError: one of the others has other boxes: it does not run the same network.
    """
    first, *others = [(side, answers(side)) for side in sides]
    rows: list[list[Cell]] = []
    for side, found in others:
        differences = [compare(a, b) for a, b in zip(first[1], found, strict=True)]
        pixels = max(one for one, _ in differences)
        counts = f"{sum(map(len, first[1]))}, {sum(map(len, found))}"
        rows.append([side.name, counts, f"{pixels:.2g}", f"{min(iou for _, iou in differences):.3f}"])
        if not side.is_ours and pixels > MOST_PIXELS:
            raise RuntimeError(f"{side.name} has other boxes than {first[0].name}: {pixels:.2f} pixels apart")
    return rows


def answers(side: Side) -> list[list[dict[str, Any]]]:
    """The detections of each picture, asked for one after the other."""

    async def ask() -> list[bytes]:
        async with Client(side.target) as client:
            replies = [await client.send(request) for request in side.requests]
        if failed := [reply for reply in replies if reply.status != 200]:
            raise RuntimeError(f"{side.name} answered {failed[0].status}: {failed[0].body[:300]!r}")
        return [reply.body for reply in replies]

    return [orjson.loads(body)["detections"] for body in asyncio.run(ask())]


def compare(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """How far the certain objects of each are from the nearest of the other: the largest difference of a coordinate, in
    pixels, and the smallest IoU of masks, 1 without masks.
    """
    most, least = 0.0, 1.0
    for some, others in ((ours, theirs), (theirs, ours)):
        for one in some:
            if one["score"] >= CERTAIN_SCORE:
                nearest = min(others, key=lambda other: _pixels(one, other), default=None)
                if nearest is None:
                    return float("inf"), 0.0
                most = max(most, _pixels(one, nearest))
                if one.get("mask"):
                    least = min(least, float(coco.iou([one["mask"]], [nearest["mask"]], [0])[0][0]))
    return most, least


def _pixels(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    if one["label_id"] != other["label_id"]:
        return float("inf")
    return float(max(abs(a - b) for a, b in zip(one["box"], other["box"], strict=True)))


if __name__ == "__main__":
    typer.run(main)
