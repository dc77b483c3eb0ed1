"""What a run of `roiserve quantize` has found so far, in a folder beside the versions, so that an interrupted run goes
on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError

_FILE = "state.json"


class State:
    """Results by name, each written as soon as it is known.

    Args:
        folder: made if missing. What another run left there, of another model or with other pictures, is removed.
        made_of: all that the results depend on.

    Raises:
        ModelStoreError: the folder cannot be written.
    """

    def __init__(self, folder: Path, made_of: object) -> None:
        self.folder = folder
        self._made_of = hashlib.sha256(repr(made_of).encode()).hexdigest()
        self._results = self._read()
        self.was_begun = bool(self._results)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.was_begun:
                _clear(folder)
        except OSError as error:
            raise ModelStoreError(f"{folder}: cannot be written: {error.strerror}") from error

    def get(self, name: str) -> Any:
        """A result, None if it is not known yet."""
        return self._results.get(name)

    def put(self, name: str, result: object) -> None:
        """Keep a result that JSON can hold.

        Raises:
            ModelStoreError: the folder cannot be written.
        """
        self._results[name] = result
        file = self.folder / _FILE
        unfinished = file.with_suffix(".unfinished")
        document = json.dumps({"made_of": self._made_of, "results": self._results})
        try:
            unfinished.write_text(document, encoding="utf-8")
            unfinished.replace(file)
        except OSError as error:
            raise ModelStoreError(f"{file}: cannot be written: {error.strerror}") from error

    def remove(self) -> None:
        """Remove the folder, once the version is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> dict[str, Any]:
        try:
            document = json.loads((self.folder / _FILE).read_text(encoding="utf-8"))
            results = document["results"] if document["made_of"] == self._made_of else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return dict(results)


def _clear(folder: Path) -> None:
    """Remove what is in a folder, and not the folder: whoever locked it would keep nobody out of a new one."""
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
