"""How every benchmark measures and reports: the sides take turns in one run, so that whatever else the machine does
falls on all of them; medians with quartiles; memory as the operating system saw it; and beside each time what the
machine's own matrix product would have made possible.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PACKAGES = (
    "roiserve",
    "torch",
    "torchvision",
    "openvino",
    "numba",
    "numpy",
    "pillow",
    "simplejpeg",
    "opencv-contrib-python-headless",
    "pycocotools",
)
REPORTS = Path("build/benchmarks")
SGEMM_SIDE = 3072  # 36 MB a matrix: far beyond the caches, and a fifth of a second on two cores


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and the quartiles around it."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{_digits(self.median)} ({_digits(self.low)} – {_digits(self.high)})"


Cell = Spread | str | int | float


def spread(numbers: Sequence[float]) -> Spread:
    if len(numbers) == 1:
        return Spread(*(3 * list(numbers)))
    return Spread(*statistics.quantiles(numbers, n=4, method="inclusive"))


def milliseconds(seconds: Sequence[float]) -> Spread:
    return spread([1e3 * one for one in seconds])


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def _digits(number: float) -> str:
    """Three digits, but no whole ones lost."""
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def let_compile(call: Callable[[], object]) -> None:
    """Call as often as it takes until `openvino` has a graph for this size of picture."""
    for _ in range(8):
        call()
    for thread in threading.enumerate():
        if thread.name == "compile":
            thread.join()


def alternate(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    most_seconds: float = 60.0,
    least_rounds: int = 3,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Time each side once a round, in turn.

    Args:
        sides: what to call, by name.
        rounds: how many; fewer once `most_seconds` have passed.
        least_rounds: but not fewer than these, if `rounds` allows them.
        warm_up: call each once before the first round.

    Returns:
        The seconds of each side's calls, round by round.
    """
    if warm_up:
        for call in sides.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= least_rounds and time.perf_counter() - begin > most_seconds:
            break
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def until_done(call: Callable[[], object], device: str) -> Callable[[], object]:
    """The call and what it launched: on CUDA it returns before its work is done."""

    def finish() -> None:
        call()
        torch.cuda.synchronize(device)

    return call if device == "cpu" else finish


def peak_memory_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """How far the process's resident memory rose above its present size while `call` ran (Linux with glibc); on CUDA
    how far what torch has taken of the device's memory did.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        taken = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - taken
    ctypes.CDLL(None).malloc_trim(0)  # Else memory that earlier calls freed would be used again, uncounted.
    Path("/proc/self/clear_refs").write_text("5")  # The high-water mark begins anew.
    before = _status_bytes("VmRSS")
    call()
    return max(_status_bytes("VmHWM") - before, 0)


def megabytes(memory_bytes: int) -> float:
    return round(memory_bytes / 1e6, 1)


def available_memory_bytes() -> int:
    return _kibibytes("/proc/meminfo", "MemAvailable")


def count_flop(call: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products that PyTorch runs: two a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def matrix_products(
    side: int = SGEMM_SIDE, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Callable[[], object]], int]:
    """A matrix product, the fastest thing that a machine does with numbers, and its operations.

    By torch, and on the CPU by OpenVINO too if it is there: which of them is faster depends on the processor.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    product = torch.empty_like(a)
    products: dict[str, Callable[[], object]] = {"torch": lambda: torch.mm(a, b, out=product)}
    if device == "cpu" and dtype == torch.float32 and importlib.util.find_spec("openvino") is not None:
        products["openvino"] = _product_by_openvino(a, b)
    return {name: until_done(one, device) for name, one in products.items()}, 2 * side**3


def _product_by_openvino(a: Tensor, b: Tensor) -> Callable[[], object]:
    """As the layer of a network: `b` are weights."""
    # Imported here: an extra, that need not be installed.
    import openvino
    from openvino import opset13

    rows = opset13.parameter(a.shape, openvino.Type.f32)
    network = openvino.Model([opset13.matmul(rows, opset13.constant(b.numpy()), False, False)], [rows])
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(network, "CPU", config).create_infer_request()
    shared = [openvino.Tensor(a.numpy(), shared_memory=True)]
    return lambda: request.infer(shared, share_inputs=True, share_outputs=True)


def best_rates(products: Sequence[Sequence[float]], flop: int) -> list[float]:
    """Operations a second of the fastest product, round by round.

    Args:
        products: the seconds of each one's calls.
        flop: operations of a call.
    """
    return [flop / min(one_round) for one_round in zip(*products, strict=True)]


class Report:
    """The tables of one benchmark, kept as JSON and as Markdown as they grow, so that no failure loses them.

    Args:
        name: the files' name.
        folder: where they go; it is made if need be.
    """

    def __init__(self, name: str, folder: Path = REPORTS) -> None:
        self._path = folder / name
        self._head = {
            "machine": f"{_processor()}, torch on {torch.get_num_threads()} threads, {platform.platform()}",
            "versions": f"Python {platform.python_version()}, {', '.join(_versions())}",
            "environment": f"GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}",
            "command": f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".rstrip(),
            "load before": f"{os.getloadavg()[0]:.2f} processes on average in the last minute",
        }
        self._tables: dict[str, tuple[list[str], list[list[Cell]]]] = {}
        for words in self._head.items():
            print(": ".join(words), flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Write the files anew. A table takes the place of the former one of its title."""
        self._tables[title] = list(columns), [list(row) for row in rows]
        self._write()

    def show(self, titles: Collection[str] | None = None) -> None:
        """Print these tables, or all, and where they are kept."""
        for title, (columns, rows) in self._tables.items():
            if titles is not None and title not in titles:
                continue
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*map(_text, row))
            Console(width=180).print(table)
        print(f"also in {self._path}.json and {self._path}.md", flush=True)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        document = self._head | {
            "tables": [
                {"title": title, "rows": [dict(zip(columns, map(_plain, row), strict=True)) for row in rows]}
                for title, (columns, rows) in self._tables.items()
            ]
        }
        self._path.with_suffix(".json").write_text(json.dumps(document, indent=1, ensure_ascii=False))
        head = "".join(f"- {name}: {words}\n" for name, words in self._head.items())
        tables = "".join(f"\n{markdown(title, *table)}" for title, table in self._tables.items())
        self._path.with_suffix(".md").write_text(f"{head}{tables}")


def markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table as documents have it; medians with their quartiles in brackets."""
    lines = [columns, ["---"] * len(columns), *([_text(cell) for cell in row] for row in rows)]
    return f"{title}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(cell: Cell) -> str:
    return _digits(cell) if isinstance(cell, float) else str(cell)


def _plain(cell: Cell) -> object:
    return asdict(cell) if isinstance(cell, Spread) else cell


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # an extra
            found.append(f"no {name}")
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = f"{len(names)} x {names[0]}" if names else platform.processor()
    return f"{processor}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else processor


def _status_bytes(name: str) -> int:
    return _kibibytes("/proc/self/status", name)


def _kibibytes(file: str, name: str) -> int:
    [line] = [line for line in Path(file).read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])
