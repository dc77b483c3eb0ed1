"""The client is a package of its own: its wheel is built without the network and works beside httpx and NumPy alone."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import roiserve_client
from tests.fakes import picture
from tests.integration.conftest import Live

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "client"
PACKAGE = FOLDER / "roiserve_client"
PROJECT = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
BARE = ROOT / ".tools/client/bin/python"

PROGRAM = """
import asyncio, json, sys
import roiserve_client
from roiserve_client import AsyncClient, Client

url, path = sys.argv[1:]
async def detect():
    async with AsyncClient(url) as client:
        return await client.detect(path)

with Client(url) as client:
    answers = [client.detect(path), asyncio.run(detect())]
modules = sorted({name.split(".")[0] for name in sys.modules})
masks = [list(answer.masks.shape) for answer in answers]
print(json.dumps([roiserve_client.__file__, [answer.labels for answer in answers], masks, modules]))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("client")
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    run = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder / "dist" / run.stdout.split()[-1]


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        [metadata] = [packed.read(name).decode() for name in names if name.endswith("/METADATA")]
    sources = {f"roiserve_client/{path.name}" for path in PACKAGE.iterdir() if path.is_file()}
    assert {name for name in names if ".dist-info/" not in name} == sources
    assert "roiserve_client/py.typed" in sources
    assert {name.rpartition("/")[2] for name in names - sources} >= {"METADATA", "entry_points.txt", "LICENSE"}
    assert f"Version: {roiserve_client.__version__}\n" in metadata


def test_everything_imported_is_declared() -> None:
    nodes = [node for path in PACKAGE.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in imported} - sys.stdlib_module_names - {"roiserve_client"}
    assert outside == {re.split(r"\W", one)[0] for one in PROJECT["dependencies"]} == {"httpx", "numpy"}


def test_it_works_without_the_packages_of_the_server(live: Live, wheel: Path, tmp_path: Path) -> None:
    if not BARE.exists():
        pytest.skip("the environment for the client is not installed: tests/install_tools.sh")
    (tmp_path / "a.png").write_bytes(picture())
    site = tmp_path / "site"
    flags = ["--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([str(BARE), "-m", "pip", "install", *flags, str(wheel)], check=True)
    run = subprocess.run(
        [BARE, "-c", PROGRAM, live.url, tmp_path / "a.png"],
        env={"PYTHONPATH": str(site), "NO_PROXY": "*"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    file, labels, masks, modules = json.loads(run.stdout)
    assert Path(file).is_relative_to(site)
    assert labels == [["cat", "dog"]] * 2
    assert masks == [[2, 48, 64]] * 2
    assert not {"service", "fastapi", "torch", "PIL", "rich", "orjson", "pydantic"} & set(modules)
    assert (site / "bin/roiserve-client").exists()
