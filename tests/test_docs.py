"""The documentation keeps up with the code: every setting and metric stands in its table, none that is gone does, links
lead somewhere. `make test ARGS="tests/test_docs.py --update-docs"` writes the tables anew.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from pydantic.fields import FieldInfo

from docs.list_licences import installed
from service.answers import encode
from service.api.errors import ERROR_STATUS
from service.api.options import AnnotateParameters, AnswerParameters, BodyParameters, DetectParameters
from service.errors import ServiceError
from service.metrics import Metrics
from service.settings import OTHER_VARIABLES, Settings
from service.structures import Detections, Image, Json, MaskFormat
from tests.fakes import FAKE_INFO

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
BOUNDS = {"ge": "from {}", "gt": "above {}", "le": "to {}", "lt": "below {}"}


def settings_table() -> str:
    """A row for each setting: variable, flag, default, range and help."""
    rows = ["| environment variable | flag of `serve` | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        meaning = f"{field.description}{bounds(field)}".replace("<", "&lt;").replace("|", "\\|")
        rows.append(f"| `ROISERVE_{name.upper()}` | `{flag}` | {default(field)} | {meaning} |")
    return "\n".join(rows)


def default(field: FieldInfo) -> str:
    """As an operator would write it."""
    if field.default_factory is not None or field.default in (None, ()):
        return "unset"
    return f"`{field.default}`"


def bounds(field: FieldInfo) -> str:
    """The range in words, or nothing."""
    found = [
        words.format(getattr(limit, key))
        for limit in field.metadata
        for key, words in BOUNDS.items()
        if hasattr(limit, key)
    ]
    return f" Range: {' '.join(found)}." if found else ""


def metric_objects() -> Iterator[MetricWrapperBase]:
    """Every metric of an app, in the order of `service/metrics.py`."""
    registry = CollectorRegistry()
    Metrics(registry)
    return (metric for metric in registry._collector_to_names if isinstance(metric, MetricWrapperBase))


def metrics_table() -> str:
    """A row for each metric: name, type, labels and help."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metric_objects():
        [family] = metric.describe()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = ", ".join(f"`{label}`" for label in metric._labelnames) or "–"
        rows.append(f"| `{name}` | {family.type} | {labels} | {family.documentation} |")
    return "\n".join(rows)


@pytest.mark.parametrize(("page", "table"), [("configuration.md", settings_table), ("metrics.md", metrics_table)])
def test_table_is_what_the_code_says(page: str, table: object, request: pytest.FixtureRequest) -> None:
    path = ROOT / "docs" / page
    assert callable(table)
    fresh = re.sub(
        r"(?<=<!-- table -->\n).*?(?=\n<!-- /table -->)", lambda _: table(), path.read_text(), flags=re.DOTALL
    )
    if request.config.getoption("--update-docs"):
        path.write_text(fresh)
    assert fresh == path.read_text(), (
        f'docs/{page} is behind the code: make test ARGS="tests/test_docs.py --update-docs"'
    )
    assert "<!-- table -->\n| " in fresh


def test_every_package_of_the_image_stands_among_the_licences() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \| .+ \|$", (ROOT / "docs/licences.md").read_text(), flags=re.MULTILINE)
    assert set(installed()) <= set(rows), "python -m docs.list_licences"


def test_every_option_of_a_detection_stands_in_the_readme() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| .+ \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(DetectParameters.model_fields)
    assert set(re.findall(r"`(\w+)`", dict(rows)["masks"])) == set(get_args(MaskFormat))


def test_every_setting_that_is_spoken_of_exists() -> None:
    known = {f"ROISERVE_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    known |= {"ROISERVE_API_KEY", "ROISERVE_SERVICE_HOST"}  # of `roiserve bench`, and of Kubernetes
    spoken = {
        (path.name, name) for path in texts() for name in re.findall(r"\bROISERVE_[A-Z_]+[A-Z]\b", path.read_text())
    }
    assert {(page, name) for page, name in spoken if name not in known} == set()


def test_every_metric_that_is_spoken_of_exists() -> None:
    known = {family.name for metric in metric_objects() for family in metric.describe()} | {
        "roiserve_client"
    }  # the client's package
    spoken = {
        (path.name, name) for path in texts() for name in re.findall(r"\broiserve_[a-z_]+[a-z]\b", path.read_text())
    }
    assert {
        (page, name) for page, name in spoken if re.sub(r"_(total|bucket|sum|count)$", "", name) not in known
    } == set()


def texts() -> list[Path]:
    """Where settings and metrics are spoken of."""
    return [
        *PAGES,
        ROOT / "Dockerfile",
        ROOT / "docker-compose.yml",
        ROOT / ".env.example",
        *(ROOT / "docker").rglob("*.*"),
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Files exist, headings exist; addresses on the internet are not asked."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        target, _, heading = link.partition("#")
        if "://" in target or target.startswith("mailto:"):
            continue
        path = (page.parent / target) if target else page
        if not path.exists() or (heading and heading not in anchors(path)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tracked_files_name_no_machine_of_their_authors() -> None:
    """No package registry's address and no folder of a developer's machine: the project must not depend on either."""
    places = ["pypi" + ".org", "python" + "hosted", "deb.debian" + ".org", "npmjs" + ".org", "/" + "work/"]
    run = subprocess.run(
        ["git", "grep", "-I", "-n", "-F", *(word for place in places for word in ("-e", place))],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if run.returncode == 128:
        pytest.skip("not a git checkout")
    assert run.stdout == ""


HTTP_API = (ROOT / "docs" / "http-api.md").read_text()


def test_every_error_that_a_caller_can_get_is_explained_with_its_status() -> None:
    rows = {code: int(status) for status, code in re.findall(r"^\| (\d+) \| `(\w+)` \|", HTTP_API, flags=re.MULTILINE)}
    kinds = {
        kind.code: kind
        for kind in subclasses(ServiceError)
        if kind.__module__.startswith(("service.errors", "service.api."))
    }
    offline = {"dataset_error"}  # of commands
    assert rows.keys() == kinds.keys() - offline
    for code, status in rows.items():
        found = next(ERROR_STATUS[kind] for kind in kinds[code].__mro__ if kind in ERROR_STATUS)
        assert (code, status) == (code, found[0])


def subclasses(kind: type[ServiceError]) -> set[type[ServiceError]]:
    """It and all that inherit from it."""
    return {kind}.union(*map(subclasses, kind.__subclasses__()))


def test_every_option_and_mask_form_stands_on_the_page_of_the_api() -> None:
    options = HTTP_API.partition("## Options")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|", options, flags=re.MULTILINE)
    known = AnnotateParameters.model_fields | AnswerParameters.model_fields | BodyParameters.model_fields
    assert sorted(rows) == sorted(known)
    forms = HTTP_API.partition("## Masks")[2].partition("\n## ")[0]
    assert {"none", *re.findall(r"^\| `(\w+)` \|", forms, flags=re.MULTILINE)} == set(get_args(MaskFormat))


def code_block(language: str, word: str) -> str:
    """The block of the page of the API that holds this word."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", HTTP_API, flags=re.DOTALL)
    return next(block for block in blocks if word in block)


# Two parts, a hole, and the image's corners.
MASK = np.zeros((1, 28, 28), np.float32)
MASK[0, :20, :12] = MASK[0, 22:, 15:] = 1
MASK[0, 5:15, 3:9] = 0


def test_decoders_of_the_page_give_the_same_mask_in_every_form() -> None:
    space: dict[str, Any] = {}
    exec(code_block("python", "from_rle"), space)
    box = np.array([[10, 5, 60, 45]], np.float32)
    size = (48, 64)
    info, image = FAKE_INFO, Image(np.zeros((*size, 3), np.uint8), orientation_applied=False)
    found = Detections(box, np.array([1]), np.array([0.9], np.float32), MASK)
    forms = {form: json.loads(encode(Json(form), image, found, info))[0]["mask"] for form in get_args(MaskFormat)[:4]}
    whole = space["from_rle"](forms["rle"])
    assert 0 < whole.sum() < whole.size
    assert (space["from_polygons"](forms["polygons"], *size) == whole).all()
    assert (space["from_png"](forms["png"]) == whole).all()
    assert (space["from_crop"](forms["crop"], *size) == whole).all()
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    script = f"{code_block('javascript', 'fromRle')}\nconsole.log(fromRle({json.dumps(forms['rle'])}).join(''))"
    printed = subprocess.run([node, "-e", script], capture_output=True, text=True, check=True).stdout.strip()
    assert printed == "".join(str(int(one)) for one in whole.ravel())
