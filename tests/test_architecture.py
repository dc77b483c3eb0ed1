"""The house is built as its floor plan says: `service/__init__.py` draws the rooms, imports go downwards only, and the
rooms that must stay light stay light, also through what they import.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import service

PACKAGE = Path(__file__).parent.parent / "service"

# Rooms on one floor (between two arrows) do not import one another either.
ORDER = (
    "cli → commands → cluster → app | training → api → workers → pipeline → answers → batching | imaging | masks "
    "| inference → model_store → modeling → ops → metrics | tracing → structures → settings | logs | jit | load "
    "| devices → cores | memory → control_groups | errors | tasks | tensors"
)
FLOORS = {room: floor for floor, rooms in enumerate(ORDER.split(" → ")) for room in rooms.split(" | ")}

# What a room may not know although it lies below, or is no room of ours.
FORBIDDEN = {
    "cli": ["torch"],  # `roiserve --help` need not wait for it
    "api": ["torch", "torchvision"],
    "batching": ["torch", "torchvision", "fastapi", "starlette"],
    "modeling": ["service.settings"],
    "training": ["service.api", "service.batching"],
    "load": ["torch", "torchvision", "numpy", "fastapi"],  # it shares a machine with what it measures
}


def room_of(module: str) -> str:
    """`service.api.detect` lies in `api`."""
    return module.split(".")[1]


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by its dotted name, parsed."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        if parts != ("service", "__init__"):
            yield ".".join(parts), ast.parse(path.read_text())


def imports(module: str, tree: ast.Module) -> Iterator[str]:
    """The dotted names that a module imports, wherever in it: at the top, in a function, for type checking only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*module.split(".")[: -node.level], node.module] if node.level else [node.module]
            names = [f".{alias.name}" for alias in node.names]
            yield from (".".join(filter(None, base)) + name for name in names)


def test_every_file_lies_in_a_room_of_the_order() -> None:
    assert {room_of(module) for module, _ in modules()} - {"__main__"} <= set(FLOORS)


def test_imports_go_downwards_only() -> None:
    upwards = [
        f"{module} imports {name}"
        for module, tree in modules()
        for name in imports(module, tree)
        if name.startswith("service.") and room_of(name) != room_of(module)
        if FLOORS.get(room_of(module), -1) >= FLOORS[room_of(name)]
    ]
    assert not upwards


@pytest.mark.parametrize("room", FORBIDDEN)
def test_room_names_nothing_that_it_must_not_know(room: str) -> None:
    named = [
        f"{module} imports {name}"
        for module, tree in modules()
        if room_of(module) == room
        for name in imports(module, tree)
        for forbidden in FORBIDDEN[room]
        if f"{name}.".startswith(f"{forbidden}.")
    ]
    assert not named


@pytest.mark.parametrize("room", FORBIDDEN)
def test_importing_a_room_loads_nothing_that_it_must_not_know(room: str) -> None:
    """Not through what it imports either, which only an interpreter of its own can tell."""
    program = (
        "import importlib, pkgutil, sys\n"
        "room = importlib.import_module(sys.argv[1])\n"
        "for module in pkgutil.walk_packages(getattr(room, '__path__', []), room.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        "print(*sys.modules)\n"
    )
    command = [sys.executable, "-c", program, f"service.{room}"]
    run = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not set(run.stdout.split()) & set(FORBIDDEN[room])


def test_floor_plan_draws_the_rooms_that_exist() -> None:
    drawn = set(re.findall(r"^[├└]── ([\w.]+)", str(service.__doc__), flags=re.MULTILINE))
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert drawn == files | folders


def test_floor_plan_states_this_order() -> None:
    assert ORDER in " ".join(str(service.__doc__).split())


def test_process_that_serves_http_does_not_load_what_its_workers_run() -> None:
    program = (
        "import sys\n"
        "from service.app import create_app\n"
        "from service.settings import Settings\n"
        "create_app(Settings())\n"
        "print(*sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert not set(run.stdout.split()) & {"torch", "torchvision", "numba", "cv2", "service.inference"}


def test_the_client_and_the_service_do_not_import_each_other() -> None:
    client = PACKAGE.parent / "client/roiserve_client"
    theirs = {
        name for path in client.glob("*.py") for name in imports("roiserve_client.x", ast.parse(path.read_text()))
    }
    assert not {name for name in theirs if name.split(".")[0] in ("service", "roiserve")}
    ours = {name for module, tree in modules() for name in imports(module, tree)}
    assert not {name for name in ours if name.startswith("roiserve_client")}
