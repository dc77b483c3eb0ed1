"""`roiserve bench`: load on a server that runs, from a folder of pictures. Words, tables and progress only; the work is
`service/load`'s.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from service.errors import InvalidRequestError, ServiceError

if TYPE_CHECKING:
    from service.load.client import Client, Target
    from service.load.generators import Send
    from service.load.knee import Division, Knee, Suggestion
    from service.load.summary import Record, Summary

T = TypeVar("T", int, float)

_PROGRESS_SECONDS = 0.2
# The 99th percentile of fewer is their slowest.
_ENOUGH_REQUESTS = 100
_INTERRUPTED = 130
# Enough that every worker has a batch under way and another one waiting.
_CALLERS_PER_WORKER = 8
# How long a server may take to load and compile its models, all workers at once.
_START_SECONDS = 900.0
# Answers that will be no other for another picture.
_HOPELESS_STATUSES = (401, 403, 404, 405)
_HOPELESS_CODES = ("invalid_request",)


def bench(
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of pictures to send, of any sizes and formats.")],
    url: Annotated[str | None, typer.Option(help="The server, such as http://127.0.0.1:8000.")] = None,
    concurrency: Annotated[
        str, typer.Option(metavar="N,N,…", help="Closed loops: so many callers, each waiting for its answer.")
    ] = "1,2,4,8",
    rate: Annotated[
        str | None,
        typer.Option(metavar="R,R,…", help="Open loops instead: Poisson arrivals, so many requests a second."),
    ] = None,
    find_knee: Annotated[
        bool,
        typer.Option("--find-knee", help="Then raise the rate until the server bends, and suggest settings for it."),
    ] = False,
    find_workers: Annotated[
        bool,
        typer.Option(
            "--find-workers",
            help="Instead of --url: start servers here with 1, 2, 4, … workers in turn, as the ROISERVE_ variables "
            "configure them, and suggest how many workers should divide the cores.",
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long each load lasts.")] = 10.0,
    warm_up_seconds: Annotated[float, typer.Option(min=0, help="Load before the first that is measured.")] = 2.0,
    model: Annotated[str | None, typer.Option(help="NAME or NAME@VERSION; the server's default if unset.")] = None,
    masks: Annotated[
        Literal["rle", "polygons", "png", "crop", "none"] | None, typer.Option(help="Form of the masks.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Another option of the requests, as score_thresh=0.5; repeatable."),
    ] = None,
    path: Annotated[str, typer.Option(help="The route; it gets a picture as its body.")] = "/v1/detect",
    api_key: Annotated[
        str | None, typer.Option(envvar="ROISERVE_API_KEY", help="Key to send. Best set as a variable.")
    ] = None,
    timeout_seconds: Annotated[float, typer.Option(min=0.1, help="Longest wait for one answer.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The same one sends the same pictures at the same times.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON; - prints only them.")
    ] = None,
    max_p99_ms: Annotated[
        float | None, typer.Option(min=0, help="Exit with 1 if a load's p99 is above it; bounds the suggested queue.")
    ] = None,
    max_error_rate: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Exit with 1 if more than this part of a load is not answered 200."),
    ] = None,
) -> None:
    """Measure a server that runs: throughput, latency from intended starts, errors by status, and where it bends.

    Example: roiserve bench --url http://127.0.0.1:8000 --images photos/ --find-knee --json bench.json
    """
    from service.load.client import Target
    from service.load.pictures import endless, read_pictures

    if rate is not None and find_knee:
        raise typer.BadParameter("--find-knee chooses its rates itself; leave --rate out")
    if find_workers and (url is not None or rate is not None or find_knee):
        raise typer.BadParameter(
            "--find-workers starts servers and chooses its loads itself; leave --url, --rate and --find-knee out"
        )
    if url is None and not find_workers:
        raise typer.BadParameter("expected --url of a server that runs, or --find-workers")
    target = Target.of_url(url or "http://127.0.0.1:8000")
    pictures = read_pictures(images)
    query = _query(option or [], model=model, masks=masks)
    key = {} if api_key is None else {"X-API-Key": api_key}

    def requests_to(target: Target) -> Iterator[bytes]:
        requests = [
            target.request("POST", path, query=query, headers={"Content-Type": one.content_type, **key}, body=one.data)
            for one in pictures
        ]
        return endless(requests, seed=seed)

    plan = _Plan(
        target=target,
        requests=requests_to(target),
        timeout_seconds=timeout_seconds,
        warm_up_seconds=warm_up_seconds,
        concurrencies=_numbers("--concurrency", concurrency, int) if rate is None else [],
        rates=[] if rate is None else _numbers("--rate", rate, float),
        find_knee=find_knee,
        seconds=seconds,
        max_p99_ms=max_p99_ms,
        seed=seed,
    )
    report = _Report(url=url or "local servers", path=path, options=query, pictures=len(pictures), seed=seed)
    status = 0
    try:
        asyncio.run(_find_division(plan, report, requests_to) if find_workers else _measure(plan, report))
        report.is_complete = True
    except KeyboardInterrupt:
        status = _INTERRUPTED
        typer.secho("interrupted; this is what there is", fg="yellow", err=True)
    except ServiceError as error:
        if not report.levels:
            raise
        status = 1
        typer.secho(str(error), fg="red", err=True)
    if json_file != Path("-"):
        _print_report(report)
    if json_file is not None:
        _write_json(report, json_file)
    if problems := list(_problems(report.levels, max_p99_ms=max_p99_ms, max_error_rate=max_error_rate)):
        typer.secho("\n".join(problems), fg="red", err=True)
        raise typer.Exit(1)
    if status:
        raise typer.Exit(status)


def _query(options: Sequence[str], *, model: str | None, masks: str | None) -> dict[str, str]:
    query = {name: value for name, value in (("model", model), ("masks", masks)) if value is not None}
    for one in options:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"expected NAME=VALUE, got {one!r}", param_hint="--option")
        query[name] = value
    return query


def _numbers(flag: str, text: str, kind: Callable[[str], T]) -> list[T]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) <= 0 or not all(map(math.isfinite, numbers)):
        raise typer.BadParameter(f"expected numbers above 0 with commas between, got {text!r}", param_hint=flag)
    return numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What is to be sent. See the command's options."""

    target: Target
    requests: Iterator[bytes]
    timeout_seconds: float
    warm_up_seconds: float
    concurrencies: Sequence[int]
    rates: Sequence[float]
    find_knee: bool
    seconds: float
    max_p99_ms: float | None
    seed: int


@dataclass(frozen=True, slots=True)
class _Level:
    """One load: `value` callers at once if the mode is closed, `value` requests a second if it is open."""

    mode: Literal["closed", "open"]
    value: float
    summary: Summary

    def __str__(self) -> str:
        return _name(self.mode, self.value)


def _name(mode: str, value: float) -> str:
    if mode == "open":
        return f"{value:.3g} / s"
    return "1 caller" if value == 1 else f"{value:g} callers"


@dataclass(slots=True, kw_only=True)
class _Report:
    """What was measured so far; `levels` are the loads that were asked for, `steps` those on the way to the knee."""

    url: str
    path: str
    options: dict[str, str]
    pictures: int
    seed: int
    is_complete: bool = False
    levels: list[_Level] = field(default_factory=list)
    steps: list[_Level] = field(default_factory=list)
    knee: Knee | None = None
    suggestion: Suggestion | None = None
    divisions: list[Division] = field(default_factory=list)
    division: Division | None = None


async def _find_division(plan: _Plan, report: _Report, requests_to: Callable[[Target], Iterator[bytes]]) -> None:
    """Measure one local server after the other, each with another number of workers."""
    from service.commands._local_servers import local_server
    from service.cores import available_cores
    from service.load.knee import Division, suggest_division, worker_counts

    cores = available_cores()
    for workers in worker_counts(cores):
        async with local_server(workers, start_seconds=_START_SECONDS) as target:
            callers = _CALLERS_PER_WORKER * workers
            loads = _Report(url=report.url, path=report.path, options={}, pictures=report.pictures, seed=report.seed)
            here = replace(plan, target=target, requests=requests_to(target), concurrencies=[1, callers])
            await _measure(here, loads)
            alone, busy = (level.summary for level in loads.levels)
        if not (alone.latency_ms and busy.latency_ms):
            raise ServiceError(f"no answer with status 200 from the server with {workers} workers")
        report.divisions.append(
            Division(
                workers=workers,
                threads=max(1, cores // workers),
                alone_p50_ms=alone.latency_ms["p50"],
                alone_p99_ms=alone.latency_ms["p99"],
                throughput_per_second=busy.throughput_per_second,
                busy_p99_ms=busy.latency_ms["p99"],
            )
        )
    report.division = suggest_division(report.divisions, max_p99_ms=plan.max_p99_ms)


async def _measure(plan: _Plan, report: _Report) -> None:
    """Run every load of the plan; the report grows as they go, so that it is there if this is broken off."""
    from service.load.client import Client
    from service.load.generators import closed_loop
    from service.load.knee import find_knee, suggest
    from service.load.summary import Record

    async with Client(plan.target, timeout_seconds=plan.timeout_seconds) as client:
        await _try_once(client, next(plan.requests))

        async def send() -> int:
            return (await client.send(next(plan.requests))).status

        if plan.warm_up_seconds:
            record = Record()
            async with _shown("warming up", record, plan.warm_up_seconds):
                await closed_loop(send, record, concurrency=2, seconds=plan.warm_up_seconds)
        for concurrency in plan.concurrencies:
            await _run_level("closed", concurrency, send, plan, report.levels)
        for rate in plan.rates:
            await _run_level("open", rate, send, plan, report.levels)
        if not plan.find_knee:
            return
        closed = {int(level.value): level.summary for level in report.levels}
        if 1 not in closed:
            closed[1] = await _run_level("closed", 1, send, plan, report.levels)
        if not closed[1].latency_ms:
            raise ServiceError("no knee to be found: one caller alone got no answer with status 200")

        async def measure(rate: float) -> Summary:
            return await _run_level("open", rate, send, plan, report.steps)

        report.knee = await find_knee(measure, first_rate=0.3 * closed[1].throughput_per_second)
        report.suggestion = suggest(closed, report.knee, max_p99_ms=plan.max_p99_ms)


async def _try_once(client: Client, request: bytes) -> None:
    """Send one request, to say at once what would be wrong with all of them.

    Raises:
        ServiceError: there is no answer.
        InvalidRequestError: the answer is that the key, the route, the model or an option is wrong.
    """
    from service.load.client import NoAnswerError

    try:
        reply = await client.send(request)
    except NoAnswerError as error:
        raise ServiceError(f"no answer from the server: {error.reason}") from None
    problem = json.loads(reply.body) if reply.headers.get("content-type") == "application/problem+json" else {}
    if reply.status in _HOPELESS_STATUSES or problem.get("code") in _HOPELESS_CODES:
        raise InvalidRequestError(f"the server answers {reply.status}: {problem.get('detail', 'without a reason')}")


async def _run_level(
    mode: Literal["closed", "open"], value: float, send: Send, plan: _Plan, levels: list[_Level]
) -> Summary:
    """Run one load and add its figures to the levels, also if it is broken off."""
    from service.load.generators import closed_loop, open_loop
    from service.load.summary import Record, summarise

    record = Record()
    load: Coroutine[Any, Any, None]
    if mode == "closed":
        load = closed_loop(send, record, concurrency=int(value), seconds=plan.seconds)
    else:
        load = open_loop(send, record, rate=value, seconds=plan.seconds, seed=plan.seed)
    try:
        async with _shown(_name(mode, value), record, plan.seconds):
            await load
    finally:
        if record.samples:
            levels.append(_Level(mode, value, summarise(record.samples)))
    if record.samples and record.samples[-1].outcome == "refused":
        raise ServiceError("the server is gone: it refused the last connection; this is what there is")
    return levels[-1].summary


@asynccontextmanager
async def _shown(name: str, record: Record, seconds: float) -> AsyncIterator[None]:
    """Show on a terminal how far a load is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(name, total=seconds, now="")

        async def watch() -> None:
            while True:
                now = f"{len(record.samples)} done, {record.in_flight} under way"
                progress.update(task, advance=_PROGRESS_SECONDS, now=now)
                await asyncio.sleep(_PROGRESS_SECONDS)

        watching = asyncio.create_task(watch())
        try:
            yield
        finally:
            watching.cancel()


def _problems(levels: Sequence[_Level], *, max_p99_ms: float | None, max_error_rate: float | None) -> Iterator[str]:
    """What goes beyond the limits, in words. The steps on the way to the knee go beyond them on purpose."""
    for level in levels:
        p99 = level.summary.latency_ms.get("p99", math.inf)
        if max_p99_ms is not None and p99 > max_p99_ms:
            yield f"{level}: p99 {p99:.0f} ms is above {max_p99_ms:g} ms"
        if max_error_rate is not None and level.summary.error_rate > max_error_rate:
            yield f"{level}: error rate {level.summary.error_rate:.4f} is above {max_error_rate:g}"


def _print_report(report: _Report) -> None:
    from rich.console import Console

    console = Console()
    options = "".join(f"  {name}={value}" for name, value in report.options.items())
    console.print(f"{report.url}{report.path}{options}  {report.pictures} pictures  seed {report.seed}", soft_wrap=True)
    if report.levels:
        _print_levels(console, report.levels)
    if report.steps:
        _print_levels(console, sorted(report.steps, key=lambda level: level.value))
    if hint := _hint_at_few([*report.levels, *report.steps]):
        console.print(hint, soft_wrap=True)
    if report.knee is not None:
        bent = "" if report.knee.bent_at is None else f"; at {report.knee.bent_at:.3g} {report.knee.reason}"
        console.print(f"knee: {report.knee.rate:.3g} answers a second{bent}", soft_wrap=True)
    if report.suggestion is not None:
        flags = "  ".join(f"--{name.replace('_', '-')} {value}" for name, value in asdict(report.suggestion).items())
        console.print(f"suggested: {flags}", soft_wrap=True)
    if report.divisions:
        _print_divisions(console, report.divisions)
    if report.division is not None:
        console.print(f"suggested: --workers {report.division.workers}  ({report.division.threads} threads each)")


def _print_divisions(console: Any, divisions: Sequence[Division]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    latencies = ("one caller, p50 ms", "p99 ms", "busy, answers/s", "p99 ms")
    table = Table("workers", "threads each", *latencies, box=SIMPLE_HEAD)
    for one in divisions:
        figures = (one.alone_p50_ms, one.alone_p99_ms, one.throughput_per_second, one.busy_p99_ms)
        table.add_row(str(one.workers), str(one.threads), *(f"{figure:.1f}" for figure in figures))
    console.print(table)


def _hint_at_few(levels: Sequence[_Level]) -> str | None:
    """What to say of loads whose p99 is the luck of a few requests."""
    few = [level.summary for level in levels if level.summary.requests < _ENOUGH_REQUESTS]
    if not few:
        return None
    slowest = max(summary.seconds / max(summary.requests, 1) for summary in few)
    return (
        f"{len(few)} of {len(levels)} loads had fewer than {_ENOUGH_REQUESTS} requests, so their p99 is the slowest of "
        f"a few; --seconds {math.ceil(_ENOUGH_REQUESTS * slowest)} would be enough"
    )


def _print_levels(console: Any, levels: Sequence[_Level]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from service.load.summary import PERCENTILES

    table = Table(
        "load",
        "answers/s",
        *(f"{name} ms" for name in PERCENTILES),
        "sent late",
        "answers",
        box=SIMPLE_HEAD,
        padding=(0, 0),
        pad_edge=False,
    )
    for column in table.columns[1:-1]:
        column.justify = "right"
    for level in levels:
        summary = level.summary
        latencies = [f"{summary.latency_ms[name]:.1f}" if summary.latency_ms else "–" for name in PERCENTILES]
        answers = ", ".join(f"{count}×{outcome}" for outcome, count in summary.outcomes.items())
        throughput, late = f"{summary.throughput_per_second:.2f}", f"{summary.lateness_ms:.1f}"
        table.add_row(str(level), throughput, *latencies, late, answers)
    console.print(table)


def _write_json(report: _Report, file: Path) -> None:
    text = json.dumps(asdict(report), indent=2)
    if file == Path("-"):
        typer.echo(text)
    else:
        try:
            file.write_text(f"{text}\n", encoding="utf-8")
        except OSError as error:
            raise InvalidRequestError(f"{file}: cannot be written: {error.strerror}") from None
