import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from service.errors import ModelStoreError
from service.model_store.download import Patience, _write_all, _WriteError, download

SIZE = 2**20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


def fetch(
    server: Any, path: Path, *, sha256: str | None = None, tries: int = 5, timeout_seconds: float = 30
) -> list[tuple[int, int]]:
    """Download the server's file; what was said of the progress."""
    told: list[tuple[int, int]] = []
    download(
        server.base_url + "weights.pth",
        path,
        sha256=sha256 or hashlib.sha256(server.content).hexdigest(),
        size=SIZE,
        on_progress=lambda present, total: told.append((present, total)),
        patience=Patience(tries=tries, timeout_seconds=timeout_seconds),
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
    with pytest.raises(ModelStoreError, match=f"corrupted: expected the sha256 {sha256}, got "):
        fetch(file_server, path, sha256=sha256)
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
    with pytest.raises(ModelStoreError, match=r"another file: expected 1,048,576 bytes, got 43, a web page"):
        fetch(file_server, path)
    assert not path.exists()


def test_an_unreachable_server_and_a_file_url_are_named(path: Path) -> None:
    with pytest.raises(ModelStoreError, match=r"not complete after 2 tries, the last: .*refused"):
        fetch_from("http://127.0.0.1:1/x", path, Patience(tries=2))
    with pytest.raises(ModelStoreError, match="expected a URL with http:// or https://, got file:///etc/passwd"):
        fetch_from("file:///etc/passwd", path, Patience())


def fetch_from(url: str, path: Path, patience: Patience) -> None:
    """Download a megabyte of zeros, as far as this server has it."""
    sha256 = hashlib.sha256(bytes(SIZE)).hexdigest()
    download(url, path, sha256=sha256, size=SIZE, on_progress=lambda present, total: None, patience=patience)


@contextmanager
def evil_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that reads a request and then does what it is told; ends with its last caller."""

    def serve() -> None:
        with suppress(OSError):  # the listener was closed
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/weights.pth"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


@pytest.mark.parametrize("head", ["Connection: close", "Transfer-Encoding: chunked"])
def test_an_endless_body_is_left_at_the_size_of_the_file(head: str, path: Path) -> None:
    largest = 0

    def answer(connection: socket.socket) -> None:
        nonlocal largest
        connection.sendall(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        while True:
            block = b"?" * 65536
            connection.sendall(b"10000\r\n" + block + b"\r\n" if "chunked" in head else block)
            largest = max(largest, path.stat().st_size if path.exists() else 0)

    with evil_server(answer) as url, pytest.raises(ModelStoreError, match="corrupted: expected the sha256"):
        fetch_from(url, path, Patience())
    assert largest <= SIZE
    assert not path.exists()


def test_a_body_that_drips_counts_as_a_broken_connection(path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode())
        while True:
            connection.sendall(b"x")
            time.sleep(0.01)

    patience = Patience(tries=2, period_seconds=0.05)
    with (
        evil_server(answer) as url,
        pytest.raises(ModelStoreError, match=r"after 2 tries, the last: only \d+ bytes came"),
    ):
        fetch_from(url, path, patience)


@pytest.mark.parametrize("length", ["abc", "-5", "1_0", "", "9" * 20, "5"])
def test_a_length_that_cannot_be_is_no_traceback(length: str, path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\nx".encode())

    with evil_server(answer) as url, pytest.raises(ModelStoreError, match=r"another file|not complete"):
        fetch_from(url, path, Patience(tries=1))


def test_what_a_server_says_reaches_no_terminal_as_it_came(path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 404 \x1b[31mred\x1b]0;title\x07" + b"!" * 5000 + b"\r\n\r\n")

    with evil_server(answer) as url, pytest.raises(ModelStoreError, match="refused by the server: 404") as caught:
        fetch_from(url, path, Patience())
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "data:,x"])
def test_redirects_lead_to_the_web_alone(target: str, path: Path) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode())

    with (
        evil_server(answer) as url,
        pytest.raises(ModelStoreError, match=r"refused by the server: 302 .*(neither http:// nor https|not allowed)"),
    ):
        fetch_from(url, path, Patience())


def test_a_full_disk_is_told_from_a_broken_connection() -> None:
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(_WriteError, match="No space left on device"):
        _write_all(full, b"x")
