"""`import roiserve` is what docs/python.md says, and the wheel holds the two packages and nothing else."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import roiserve

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()


@pytest.mark.parametrize("name", roiserve.__all__)
def test_a_public_name_is_the_object_of_its_home(name: str) -> None:
    home = importlib.import_module(roiserve._HOME_OF[name])
    assert getattr(roiserve, name) is getattr(home, name)


def test_every_public_name_stands_on_its_page() -> None:
    rows = re.findall(r"^\| (`.+?) \| ", PAGE, flags=re.MULTILINE)
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(roiserve.__all__)
    assert sorted(roiserve._HOME_OF) == sorted(roiserve.__all__)
    assert set(dir(roiserve)) == {*roiserve.__all__, "__version__"}


def test_unknown_names_are_refused_as_of_any_module() -> None:
    name = "nothing"
    with pytest.raises(AttributeError, match="module 'roiserve' has no attribute 'nothing'"):
        getattr(roiserve, name)


def test_importing_it_loads_nothing_heavy() -> None:
    program = "import sys, roiserve; print(roiserve.__version__, *sys.modules)"
    words = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert words[0] == roiserve.__version__
    assert not {"torch", "numpy", "fastapi", "service"} & set(words)


def test_the_example_of_the_page_finds_nuclei() -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    run = subprocess.run([sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert re.match(r"nucleus 0\.999 \[ ?76\.\d+ +188\.\d+ +96\.\d+ +208\.\d+ ?\]\n", run.stdout)
    assert len(run.stdout.splitlines()) == 2


def test_the_wheel_holds_the_two_packages_and_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("roiserve", "service"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    program = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(tmp_path / "dist" / run.stdout.split()[-1]) as wheel:
        names = set(wheel.namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    sources = {
        str(path.relative_to(ROOT))
        for package in ("roiserve", "service")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert packed == sources
    assert {name.rpartition("/")[2] for name in names - packed} >= {"METADATA", "entry_points.txt", "LICENSE"}
