import hashlib
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelStoreError
from service.model_store.download import download

SIZE = 2**20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def fetch(
    server: Any, path: Path, *, sha256_prefix: str | None = None, tries: int = 5, timeout_seconds: float = 30
) -> list[tuple[int, int | None]]:
    """Download the server's file; what was said of the progress."""
    told: list[tuple[int, int | None]] = []
    download(
        server.base_url + "weights.pth",
        path,
        sha256_prefix=sha256_prefix or hashlib.sha256(server.content).hexdigest()[:8],
        on_progress=lambda present, total: told.append((present, total)),
        tries=tries,
        timeout_seconds=timeout_seconds,
    )
    return told


def test_a_file_is_downloaded_and_its_progress_told(file_server: Any, path: Path) -> None:
    told = fetch(file_server, path)
    assert path.read_bytes() == file_server.content
    assert told == sorted(told)
    assert told[-1] == (SIZE, SIZE)


def test_a_broken_connection_is_opened_again_for_the_rest(file_server: Any, path: Path) -> None:
    file_server.cut_after_bytes = [1000, 500]
    told = fetch(file_server, path)
    assert path.read_bytes() == file_server.content
    assert [asked for _, asked in file_server.asked] == [None, "bytes=1000-", "bytes=1500-"]
    assert {total for _, total in told} == {SIZE}


def test_a_download_that_stays_truncated_says_so_and_goes_on_the_next_time(file_server: Any, path: Path) -> None:
    file_server.cut_after_bytes = [1000, 0]
    with pytest.raises(ModelStoreError, match=r"not complete after 2 tries.* 1,000 of 1,048,576 bytes.* to go on"):
        fetch(file_server, path, tries=2)
    assert path.stat().st_size == 1000
    fetch(file_server, path)
    assert path.read_bytes() == file_server.content
    assert file_server.asked[-1][1] == "bytes=1000-"


def test_a_server_that_does_no_ranges_sends_it_all_again(file_server: Any, path: Path) -> None:
    path.write_bytes(file_server.content[:1000])
    file_server.does_ranges = False
    fetch(file_server, path)
    assert path.read_bytes() == file_server.content


def test_a_corrupted_download_is_deleted_and_said_to_be_corrupted(file_server: Any, path: Path) -> None:
    sha256 = hashlib.sha256(file_server.content).hexdigest()
    file_server.content = file_server.content[:-1] + b"?"
    with pytest.raises(ModelStoreError, match=f"corrupted: expected a sha256 that starts with {sha256[:8]}, got "):
        fetch(file_server, path, sha256_prefix=sha256[:8])
    assert not path.exists()


def test_a_part_of_something_else_does_not_survive(file_server: Any, path: Path) -> None:
    path.write_bytes(b"?" * 1000)
    with pytest.raises(ModelStoreError, match="corrupted"):
        fetch(file_server, path)
    fetch(file_server, path)
    assert path.read_bytes() == file_server.content


def test_a_whole_file_is_not_downloaded_again(file_server: Any, path: Path) -> None:
    path.write_bytes(file_server.content)
    assert fetch(file_server, path) == []
    assert file_server.asked == []


def test_a_wrong_file_of_the_full_length_is_deleted(file_server: Any, path: Path) -> None:
    path.write_bytes(b"?" * SIZE)
    with pytest.raises(ModelStoreError, match="corrupted"):
        fetch(file_server, path)
    assert not path.exists()


def test_a_refusal_is_final_a_server_error_is_not(file_server: Any, path: Path) -> None:
    file_server.next_status = 404
    with pytest.raises(ModelStoreError, match=r"weights\.pth: refused by the server: 404 Not Found"):
        fetch(file_server, path)
    assert len(file_server.asked) == 1
    file_server.next_status = 503
    fetch(file_server, path)
    assert path.read_bytes() == file_server.content


def test_a_server_that_always_fails_is_given_up_with_what_it_said(file_server: Any, path: Path) -> None:
    file_server.status = 500
    with pytest.raises(ModelStoreError, match="not complete after 3 tries, the last: 500 Internal Server Error"):
        fetch(file_server, path, tries=3)
    assert len(file_server.asked) == 3


@pytest.mark.parametrize("silent_after_bytes", [0, 1000])
def test_a_server_that_falls_silent_is_given_up_and_what_came_is_kept(
    silent_after_bytes: int, file_server: Any, path: Path
) -> None:
    file_server.silent_after_bytes = silent_after_bytes
    with pytest.raises(ModelStoreError, match=r"not complete after 2 tries, the last: .*timed out"):
        fetch(file_server, path, tries=2, timeout_seconds=0.2)
    assert path.read_bytes() == file_server.content[: 2 * silent_after_bytes]
    file_server.silent_after_bytes = None
    fetch(file_server, path)
    assert path.read_bytes() == file_server.content


def test_a_redirect_is_followed_for_the_rest_too(file_server: Any, path: Path) -> None:
    file_server.redirected = True
    file_server.cut_after_bytes = [1000]
    fetch(file_server, path)
    assert path.read_bytes() == file_server.content
    assert file_server.asked[-1] == ("/elsewhere/models/weights.pth", "bytes=1000-")


def test_the_page_of_a_proxy_is_not_taken_for_the_file(file_server: Any, path: Path) -> None:
    file_server.page = b"<!doctype html><title>Please log in</title>"
    with pytest.raises(ModelStoreError, match=r"corrupted: .*a web page instead of a file"):
        fetch(file_server, path)
    assert not path.exists()


def test_an_unreachable_server_and_a_file_url_are_named(path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"not complete after 2 tries, the last: .*refused"):
        download("http://127.0.0.1:1/x", path, sha256_prefix="00", on_progress=lambda present, total: None, tries=2)
    with pytest.raises(ModelStoreError, match="expected a URL with http:// or https://, got file:///etc/passwd"):
        download("file:///etc/passwd", path, sha256_prefix="00", on_progress=lambda present, total: None)
