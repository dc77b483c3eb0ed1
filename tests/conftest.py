"""Options of the whole test suite, and what its modules share."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from service.cli import let_waiting_threads_sleep

let_waiting_threads_sleep()  # Here, since it counts only before torch is imported.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-docs", action="store_true", help="write the tables of docs/ anew from the code")


@pytest.fixture(scope="module", autouse=True)
def frees_what_a_module_caches(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module's tests share by `functools.cache` goes with the last of them: networks are gigabytes together."""
    yield
    caches = [value for value in vars(request.module).values() if hasattr(value, "cache_clear")]
    for one in caches:
        one.cache_clear()
    if caches:
        gc.collect()  # A network and its engine refer to each other.
