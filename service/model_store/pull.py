"""Puts one of torchvision's published detectors into a model store: download, check, import, write."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime

from service.errors import ModelStoreError
from service.model_store.download import OnProgress, download
from service.model_store.importing import import_checkpoint, store_imported
from service.model_store.model_toml import ProvenanceTable
from service.model_store.published import PublishedWeights
from service.model_store.store import ModelStore, StoredModel

_DOWNLOADS = ".downloads"


def find_pulled(store: ModelStore, weights: PublishedWeights, *, name: str) -> StoredModel | None:
    """The version of `name` that was already made from these weights, if there is one.

    Raises:
        ModelStoreError: a model in the store is broken.
    """
    models = store.list() if store.root.exists() else []
    same = [model for model in models if model.name == name and model.problem is None]
    return next((model for model in same if str(model.model_toml.weights.source).endswith(weights.file_name)), None)


def pull_model(
    store: ModelStore,
    weights: PublishedWeights,
    *,
    name: str,
    command: str,
    on_progress: OnProgress,
    base_url: str | None = None,
) -> StoredModel:
    """Download published weights and store them as the next version of `name`.

    Args:
        command: the command line, for the provenance.
        base_url: a mirror with torchvision's files under the same names; None means torchvision's own server.

    Raises:
        ModelStoreError: the download failed (running it again resumes it), the file has the wrong hash, or the store
            cannot be written.
    """
    url = f"{base_url.rstrip('/')}/{weights.file_name}" if base_url else weights.url
    folder = store.root / _DOWNLOADS
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelStoreError(f"{folder}: cannot be written: {error.strerror}") from error
    path = folder / weights.file_name
    download(url, path, sha256=weights.sha256, size=weights.size, on_progress=on_progress)
    imported = import_checkpoint(path, labels=weights.labels, architecture=weights.builder, norm_eps=weights.norm_eps)
    provenance = ProvenanceTable(
        data="COCO train2017",
        licence="BSD-3-Clause, as torchvision's; terms of its data may apply",
        attribution="The torchvision maintainers and contributors; the COCO consortium",
        command=command,
        created=datetime.now(UTC).replace(microsecond=0),
        metrics=dict(weights.metrics),
        notes=f"torchvision's `{weights.builder}`, COCO_V1, from a file with the sha256 {weights.sha256}; the "
        "metrics are torchvision's, on COCO val2017, in percent",
    )
    stored = store_imported(store, imported, name=name, provenance=provenance, source=url)
    path.unlink()
    with suppress(OSError):  # another download is in the folder
        folder.rmdir()
    return stored
