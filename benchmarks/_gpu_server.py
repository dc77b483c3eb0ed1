"""The sections that run `roiserve serve` and load it over HTTP with `roiserve bench`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager

from prometheus_client.parser import text_string_to_metric_families

from benchmarks._bench import Bench
from benchmarks._measure import Cell
from benchmarks.serve import engine_of, running_server
from service.load.client import Client, Target

LOADS = "Over HTTP, photographs of mixed sizes"
STAGE_MEANS = "Where an image's time goes, ms on average (of a whole batch for inference)"
PROCESSES = "One and two worker processes on one device, masks=none"
POLICIES = ("exact", "bucketed")
LOAD_COLUMNS = [
    "policy",
    "engine",
    "masks",
    "callers",
    "answers/s",
    "p50 ms",
    "p99 ms",
    "errors",
    "images a batch",
    "padding %",
]
STAGES = ("decode", "queue", "preprocess", "backbone", "rpn", "roi_heads", "postprocess", "encode")


def http(bench: Bench) -> None:
    """Closed loops of 1, 8 and 32 callers, with masks and without, by batch policy."""
    rows: list[list[Cell]] = []
    stages: list[list[Cell]] = []
    for policy in POLICIES[:1] if bench.quick else POLICIES:
        if not bench.has_seconds(30):
            print(f"no time for {policy}")
            continue
        with bench.apart(policy), _server(bench, "default", {"ROISERVE_BATCH_POLICY": policy}) as target:
            engine = engine_of(target)
            for masks in ("rle",) if bench.quick else ("none", "rle"):
                for callers in (2,) if bench.quick else (32, 8, 1):
                    if not bench.has_seconds(8):
                        print(f"no time for {policy}, {masks}, {callers}")
                        continue
                    level, change = _load(bench, target, masks=masks, callers=callers)
                    batches = change.get("roiserve_batch_size_count", 0)
                    padding = change.get("roiserve_batch_padding_ratio_sum", 0) / max(batches, 1)
                    per_batch = change.get("roiserve_batch_size_sum", 0) / max(batches, 1)
                    rows.append([policy, engine, masks, callers, *level, per_batch, 100 * padding])
                    stages.append([policy, masks, callers, *(_mean_ms(change, stage) for stage in STAGES)])
                    bench.table(LOADS, LOAD_COLUMNS, rows)
                    bench.table(STAGE_MEANS, ["policy", "masks", "callers", *STAGES], stages)
                    if level[-1] != "0.0 %":
                        bench.problems.append(f"{policy}, masks={masks}, {callers} callers: {level[-1]} errors")


def processes(bench: Bench) -> None:
    """A second worker on the same device: that both serve, and what they need."""
    rows: list[list[Cell]] = []
    for workers in ("2",) if bench.quick else ("1", "2"):
        settings = {"ROISERVE_ENGINE": "eager", "ROISERVE_PRECISION": "float32" if bench.quick else bench.half}
        with bench.apart(f"{workers} workers"), _server(bench, workers, settings) as target:
            level, _ = _load(bench, target, masks="none", callers=4 if bench.quick else 16)
            rows.append([workers, *level, _apps() if bench.device == "cuda" else ""])
            columns = ["workers", *LOAD_COLUMNS[4:8], "processes and memory by nvidia-smi"]
            bench.table(PROCESSES, columns, rows)
            if level[-1] != "0.0 %":
                bench.problems.append(f"{workers} workers: {level[-1]} errors")


def _server(bench: Bench, workers: str, settings: Mapping[str, str]) -> AbstractContextManager[Target]:
    """`roiserve serve` with the measured model alone."""
    common = {
        "ROISERVE_MODEL_STORE": str(bench.store),
        "ROISERVE_DEVICE": bench.device,
        "ROISERVE_ENGINE_CACHE_DIR": str(bench.cache_dir),
        "ROISERVE_MAX_QUEUE_SIZE": "256",
    }
    if bench.quick:
        common["ROISERVE_ENGINE"] = "eager"
    return running_server([bench.stored], workers=workers, environment={**common, **settings})


def _load(bench: Bench, target: Target, *, masks: str, callers: int) -> tuple[list[Cell], dict[str, float]]:
    """Run `roiserve bench` with one number of callers.

    Returns:
        Answers a second, p50 and p99 in ms, and errors in percent; and by how much each of the server's numbers rose.
    """
    file = bench.folder / "load.json"
    host, port = target.address
    seconds, warm_up_seconds = ("0.5", "0.1") if bench.quick else ("3", "1")
    command = [sys.executable, "-m", "service", "bench", "--url", f"http://{host}:{port}", "--masks", masks]
    command += ["--images", str(bench.folder / "pictures"), "--concurrency", str(callers), "--json", str(file)]
    command += ["--seconds", seconds, "--warm-up-seconds", warm_up_seconds]
    before = _numbers(target)
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise RuntimeError(f"roiserve bench ended with {run.returncode}: {run.stderr[-500:]}")
    after = _numbers(target)
    [level] = json.loads(file.read_text())["levels"]
    summary = level["summary"]
    latencies = [summary["latency_ms"].get(name, float("nan")) for name in ("p50", "p99")]
    errors = f"{100 * summary['error_rate']:.1f} %"
    change = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return [summary["throughput_per_second"], *latencies, errors], change


def _numbers(target: Target) -> dict[str, float]:
    """The sums and counts of the server's histograms over all models, and by stage those of `stage_duration`."""

    async def ask() -> bytes:
        async with Client(target) as client:
            return (await client.send(target.request("GET", "/metrics"))).body

    numbers: dict[str, float] = {}
    for family in text_string_to_metric_families(asyncio.run(ask()).decode()):
        for sample in family.samples:
            if sample.name.endswith(("_sum", "_count")):
                stage = sample.labels.get("stage")
                name = sample.name if stage is None else f"{sample.name} {stage}"
                numbers[name] = numbers.get(name, 0.0) + sample.value
    return numbers


def _mean_ms(change: Mapping[str, float], stage: str) -> Cell:
    count = change.get(f"roiserve_stage_duration_seconds_count {stage}", 0)
    return 1e3 * change.get(f"roiserve_stage_duration_seconds_sum {stage}", 0) / count if count else "–"


def _apps() -> str:
    command = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except OSError as error:
        return f"none: {error}"
    return "; ".join(run.stdout.split("\n")).strip("; ") or "says nothing"
