"""What keeps a server from starting is found before seconds are spent on imports, and said with what to do."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.commands._preflight import check_address, check_models
from service.errors import ModelNotFoundError, ModelStoreError, ServiceError
from service.settings import Settings
from tests.tiny_models import given_proposals, store_untrained


def test_a_free_port_and_any_port_are_fine() -> None:
    check_address("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    check_address("127.0.0.1", port)


def test_a_port_in_use_is_called_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServiceError, match=rf"^cannot listen: port {port} on 127\.0\.0\.1 is in use by another"):
            check_address("127.0.0.1", port)
        with pytest.raises(ServiceError, match=r"in use by another program; choose another with --admin-port$"):
            check_address("127.0.0.1", port, flag="--admin-port")


@pytest.mark.parametrize(
    ("host", "words"), [("192.0.2.1", "has no address 192"), ("no such host", "is no address"), ("x" * 70, "is no")]
)
def test_an_address_that_is_not_ours_is_called_so(host: str, words: str) -> None:
    with pytest.raises(ServiceError, match=words):
        check_address(host, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    store_untrained(root, "discs", given_proposals("fast_rcnn"))
    return root


def test_models_that_are_there_are_fine(store: Path) -> None:
    check_models(Settings(model_store=store))
    check_models(Settings(model_store=store, models=("discs@1",), default_model="discs"))


def test_an_empty_store_is_said_with_its_folder_and_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"no model in {tmp_path}; `roiserve models pull") as caught:
        check_models(Settings(model_store=tmp_path))
    assert "models import" in str(caught.value)


def test_a_missing_store_and_unknown_models_are_said_with_what_there_is(store: Path) -> None:
    with pytest.raises(ModelStoreError, match="--store or ROISERVE_MODEL_STORE"):
        check_models(Settings(model_store=store / "nowhere"))
    with pytest.raises(ModelNotFoundError, match=r"no model 'other'.*known: discs@1"):
        check_models(Settings(model_store=store, models=("other",)))
    with pytest.raises(ModelNotFoundError, match="default model 'other' is not among discs@1"):
        check_models(Settings(model_store=store, default_model="other"))


def test_nothing_heavy_is_imported_to_find_out(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from service.cli import app\n"
        "try:\n"
        "    app(['serve', '--model-store', sys.argv[1]])\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, *sys.modules)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "nowhere")]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert words[0] == "ModelStoreError"
    assert not {"torch", "fastapi", "uvicorn", "numba"} & set(words)
