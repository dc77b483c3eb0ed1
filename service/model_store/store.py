"""The model store: a folder of models, `<name>/<version>/`. Lists all models, broken or not, finds a model by the name
in a request or a setting, and writes new models atomically. Imports torch only when weights are read or written.
"""

from __future__ import annotations

import itertools
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import ModelNotFoundError, ModelStoreError
from service.model_store.files import check_safetensors, read_text
from service.model_store.model_toml import (
    MODEL_TOML,
    WEIGHTS_FILE,
    Dtype,
    Int8Table,
    ModelToml,
    ProvenanceTable,
    WeightsTable,
    read_model_toml,
    write_model_toml,
)
from service.model_store.quantizers import Quantizers, read_quantizers, write_quantizers
from service.modeling.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

README = "README.md"
DEFAULT_FILE = "default"
"""In the folder of a name: the version that the name alone stands for."""
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class StoredModel:
    """One version of a model: a folder `<name>/<version>`, which may be broken.

    Attributes:
        path: the folder.
    """

    name: str
    version: int
    path: Path

    @property
    def key(self) -> str:
        """`name@version`, as accepted by `ModelStore.find`."""
        return f"{self.name}@{self.version}"

    @cached_property
    def model_toml(self) -> ModelToml:
        """The model's description, read and checked on first use.

        Raises:
            ModelStoreError: `model.toml` is missing or not valid.
        """
        return read_model_toml(self.path / MODEL_TOML)

    @property
    def weights_path(self) -> Path:
        """The weights file.

        Raises:
            ModelStoreError: as `model_toml`.
        """
        return self.path / self.model_toml.weights.file

    @property
    def problem(self) -> str | None:
        """What is wrong with the folder, or None. The hash of the weights is checked by `load_weights` only."""
        try:
            check_safetensors(self.weights_path)
            self.load_quantizers()
        except ModelStoreError as error:
            return str(error)
        return None

    def load_weights(self) -> dict[str, Tensor]:
        """The weights in float32 on the CPU, checked against the sha256 in `model.toml`.

        Raises:
            ModelStoreError: `model.toml` or the weights are invalid.
        """
        from service.model_store.weights import load_weights

        return load_weights(self.weights_path, self.model_toml.weights.sha256)

    def load_quantizers(self) -> Quantizers | None:
        """What runs in int8, checked against the sha256 in `model.toml`; None if nothing does.

        Raises:
            ModelStoreError: `model.toml` or that file is invalid.
        """
        table = self.model_toml.int8
        if table is None:
            return None
        quantizers = read_quantizers(self.path / table.file, table.sha256)
        if quantizers.parts != table.parts:
            expected, got = ", ".join(table.parts), ", ".join(quantizers.parts)
            raise ModelStoreError(f"{self.path / table.file}: expected layers of {expected}, got layers of {got}")
        return quantizers


class ModelStore:
    """A folder of models.

    Args:
        root: the folder; it is created by the first `write_model`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def list(self) -> list[StoredModel]:
        """Every version of every model, including broken ones, by name and ascending version.

        Raises:
            ModelStoreError: the store's folder is missing or cannot be read.
        """
        stored = [
            StoredModel(name=name_folder.name, version=int(folder.name), path=folder)
            for name_folder in _folders(self.root)
            if _NAME.fullmatch(name_folder.name)
            for folder in _readable_folders(name_folder)
            if _VERSION.fullmatch(folder.name)
        ]
        return sorted(stored, key=lambda model: (model.name, model.version))

    def misplaced(self) -> Sequence[str]:
        """A line for every folder that is not `<name>/<version>`, with the reason why, and for every file
        `default` that names none of the versions beside it.

        Raises:
            ModelStoreError: the store's folder is missing or cannot be read.
        """
        lines = []
        for name_folder in _folders(self.root):
            if not _NAME.fullmatch(name_folder.name):
                lines.append(f"{name_folder}: {_expected_name(name_folder.name)}")
                continue
            try:
                versions = [folder.name for folder in _folders(name_folder)]
            except ModelStoreError as error:
                lines.append(str(error))
                continue
            wrong = [version for version in versions if not _VERSION.fullmatch(version)]
            lines += [f"{name_folder / version}: {_expected_version(version)}" for version in wrong]
            if not versions:
                lines.append(f"{name_folder}: expected a folder for each version, such as '1', got none")
        return [*lines, *(str(one) for one in self._defaults() if isinstance(one, ModelStoreError))]

    def defaults(self) -> Sequence[StoredModel]:
        """The version that each name stands for; none where the file `default` is wrong.

        Raises:
            ModelStoreError: the store's folder is missing or cannot be read.
        """
        return [one for one in self._defaults() if isinstance(one, StoredModel)]

    def _defaults(self) -> Iterator[StoredModel | ModelStoreError]:
        for _, versions in itertools.groupby(self.list(), key=lambda model: model.name):
            try:
                yield self.by_preference([*versions])[0]
            except ModelStoreError as error:
                yield error

    def find(self, reference: str) -> StoredModel:
        """Find a model.

        Args:
            reference: `name` (see `by_preference`) or `name@version`.

        Raises:
            ModelNotFoundError: there is none; the message lists the known models.
            ModelStoreError: the store's folder is missing or cannot be read, or the file `default` is wrong.
        """
        name, at, version = reference.partition("@")
        models = self.list()
        matches = [model for model in models if model.name == name and (not at or str(model.version) == version)]
        if not matches:
            known = ", ".join(model.key for model in models) or "none"
            raise ModelNotFoundError(f"no model {reference!r} in {self.root}; known: {known}")
        return matches[0] if at else self.by_preference(matches)[0]

    def by_preference(self, versions: Sequence[StoredModel]) -> Sequence[StoredModel]:
        """The versions of one name, best first: the one that the file `default` in the name's folder says, such as 1;
        then from the highest version to the lowest.

        Raises:
            ModelStoreError: the file says something else than one of these versions.
        """
        file = self.root / versions[0].name / DEFAULT_FILE
        ordered = sorted(versions, key=lambda model: model.version, reverse=True)
        if not file.exists():
            return ordered
        text = read_text(file).strip()
        if text not in (str(model.version) for model in versions):
            known = ", ".join(str(model.version) for model in versions)
            raise ModelStoreError(f"{file}: expected one of the versions {known}, got {text!r:.80}")
        return sorted(ordered, key=lambda model: str(model.version) != text)

    def next_version(self, name: str) -> int:
        """The next version: one above the highest existing one, or 1 for a new name."""
        versions = [model.version for model in self.list() if model.name == name] if self.root.exists() else []
        return max(versions, default=0) + 1

    def write_model(
        self,
        name: str,
        version: int,
        *,
        config: ModelConfig,
        state_dict: Mapping[str, Tensor],
        provenance: ProvenanceTable,
        readme: str,
        dtype: Dtype = "float32",
        source: str | None = None,
        int8: tuple[Int8Table, Quantizers] | None = None,
    ) -> StoredModel:
        """Write a model's folder, whole or not at all.

        Args:
            readme: the model card, Markdown.
            dtype: how floating-point weights are stored.
            source: where the weights came from, for `[weights]`.
            int8: what runs in int8; None if nothing does. Its weights are stored in int8.

        Raises:
            ModelStoreError: the name or version is invalid, the version exists already, or the weights cannot be
                stored.
        """
        # Imported here, so that listing models does not import torch.
        from service.model_store.weights import save_weights

        check_name(name, str(version))
        path = self.root / name / str(version)
        # On the same disk, under a name that `list` skips; renamed once complete.
        unfinished = path.with_name(f".unfinished-{version}-{secrets.token_hex(4)}")
        try:
            unfinished.mkdir(parents=True)
            table, quantizers = int8 or (None, Quantizers())
            sha256 = save_weights(unfinished / WEIGHTS_FILE, state_dict, dtype=dtype, in_int8=quantizers.weights)
            weights = WeightsTable(sha256=sha256, dtype=dtype, source=source)
            write_model_toml(unfinished / MODEL_TOML, config, weights, provenance, int8=table)
            if table is not None:
                write_quantizers(unfinished / table.file, quantizers)
            (unfinished / README).write_text(readme, encoding="utf-8")
            if path.exists():
                raise ModelStoreError(f"{path} exists already; a stored model is never overwritten")
            unfinished.rename(path)
        except OSError as error:
            raise ModelStoreError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return StoredModel(name=name, version=version, path=path)


def check_name(name: str, version: str) -> None:
    """Check that a model name is valid.

    Raises:
        ModelStoreError: the name is invalid; the message says what was expected.
    """
    if not _NAME.fullmatch(name):
        raise ModelStoreError(_expected_name(name))
    if not _VERSION.fullmatch(version):
        raise ModelStoreError(_expected_version(version))


def _folders(path: Path) -> Iterator[Path]:
    """The non-hidden folders in a folder, in order of name."""
    try:
        entries = sorted(path.iterdir())
    except FileNotFoundError:
        raise ModelStoreError(
            f"no model store at {path}: no such folder; name another one with --store or ROISERVE_MODEL_STORE"
        ) from None
    except OSError as error:
        raise ModelStoreError(f"{path}: cannot be read: {error.strerror}") from error
    yield from (entry for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _readable_folders(path: Path) -> Iterator[Path]:
    """Like `_folders`, but empty if the folder cannot be read: one unreadable model must not hide the others."""
    with suppress(ModelStoreError):
        yield from _folders(path)


def _expected_name(name: str) -> str:
    return f"expected a model name of a-z, 0-9, '.', '_' and '-' that starts with a letter or a digit, got {name!r}"


def _expected_version(version: str) -> str:
    return f"expected a version number such as 1, 2, 3, got {version!r}"
