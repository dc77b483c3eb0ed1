"""Write the licences of all that the image installs into docs/licences.md: `python -m docs.list_licences`. Run it in an
environment with the extras that the image has (openvino, timm); packages of other extras are not listed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import cast

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/licences.md"
EXTRAS = ("openvino", "timm")  # as in the Dockerfile
# Classifiers and free text to SPDX's identifiers, where they say the same.
_SAME = {
    "Apache Software License": "Apache-2.0",
    "Apache 2.0": "Apache-2.0",
    "Apache License 2.0": "Apache-2.0",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache 2": "Apache-2.0",
    "BSD License": "BSD",
    "BSD 3-Clause": "BSD-3-Clause",
    "BSD-3-Clause License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}


def main() -> None:
    """Write the table."""
    fresh = re.sub(
        r"(?<=<!-- table -->\n).*?(?=\n<!-- /table -->)", lambda _: table(), PAGE.read_text(), flags=re.DOTALL
    )
    PAGE.write_text(fresh)
    print(f"{PAGE}: {len(installed())} packages")


def table() -> str:
    """A row for each package."""
    rows = ["| package | licence as it states it |", "|---|---|"]
    return "\n".join([*rows, *(f"| {name} | {licence(found)} |" for name, found in sorted(installed().items()))])


def installed() -> dict[str, Distribution]:
    """What the image installs, direct and indirect, by name; without what is for other systems."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    waiting = [one for one in map(Requirement, lines) if _applies(one, frozenset())]
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        waiting += [one for one in _requirements(found[name]) if _applies(one, extras)]
    return found


def _requirements(found: Distribution) -> Iterator[Requirement]:
    return map(Requirement, found.requires or [])


def _applies(requirement: Requirement, extras: frozenset[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": one}) for one in ["", *extras])


def licence(found: Distribution) -> str:
    """Its SPDX expression, else what its classifiers or its free text say, in one line."""
    metadata = cast(Message, found.metadata)  # which it is; its protocol leaves out `get`
    if expression := metadata.get("License-Expression"):
        return str(expression)
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::") and not line.endswith("OSI Approved")
    ]
    text = (metadata.get("License") or "").strip().splitlines()
    words = classifiers or text[:1] or ["not stated"]
    return ", ".join(_SAME.get(word, word) for word in words).replace("|", "\\|")


if __name__ == "__main__":
    main()
