"""Downloads one file of known size and sha256 over HTTP: resumes after interruptions, never accepts more than that
size, and keeps the file only if its hash is right. Text from the server is never printed unescaped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage, HTTPResponse
from io import FileIO
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, OpenerDirector, Request, build_opener

from service.errors import ModelStoreError
from service.model_store.files import sha256_of

OnProgress = Callable[[int, int], None]
"""Called with the number of bytes downloaded and the total."""

_CHUNK_BYTES = 1 << 18
_RANGE_NOT_SATISFIABLE = 416
_MAX_REASON_LENGTH = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to wait for a server.

    Attributes:
        tries: how many times to reopen a broken connection.
        timeout_seconds: how long a server may be silent before the connection counts as broken.
        period_seconds: the period in which at least `least_bytes` must arrive; otherwise the connection counts as
            broken too.
    """

    tries: int = 5
    timeout_seconds: float = 30.0
    period_seconds: float = 60.0
    least_bytes: int = 64 * 1024


def download(
    url: str, path: Path, *, sha256: str, size: int, on_progress: OnProgress, patience: Patience = Patience()
) -> None:
    """Download a file, or the rest of it if `path` already holds a part.

    Args:
        url: `http://` or `https://`; redirects to other schemes are not followed.
        path: a file with the right hash is left alone; a part is kept if the download fails, and deleted if it turns
            out to be of another file.
        sha256: of the whole file, in hexadecimal.
        size: of the whole file, in bytes.

    Raises:
        ModelStoreError: the server rejected the request, the file is still incomplete after all tries, or its hash is
            wrong.
    """
    if not url.startswith(("http://", "https://")):
        raise ModelStoreError(f"expected a URL with http:// or https://, got {_printable(url)}")
    if path.exists() and sha256_of(path) == sha256:
        return
    source = _printable(url)
    problem = ""
    for _ in range(patience.tries):
        try:
            _fetch_rest(url, path, size, on_progress, patience)
            break
        except HTTPError as error:
            error.close()
            problem = f"{error.code} {_printable(str(error.reason))}"
            if error.code < 500:
                raise ModelStoreError(f"{source}: refused by the server: {problem}") from None
        except (URLError, HTTPException, OSError) as error:
            problem = _printable(str(error))
    else:
        raise ModelStoreError(
            f"{source}: not complete after {patience.tries} tries, the last: {problem}. Run it again to go on"
        )
    _check(source, path, sha256)


def _fetch_rest(url: str, path: Path, size: int, on_progress: OnProgress, patience: Patience) -> None:
    """Append the missing part of the file; start over if the server does not support ranges.

    Raises:
        ModelStoreError: the server has another file, or this one cannot be written.
        ConnectionError: the connection ended early, or was too slow.
        HTTPError, URLError, HTTPException, OSError: as raised by a urllib opener.
    """
    present = path.stat().st_size if path.exists() else 0
    if present >= size:
        return  # the hash will show whether it is the right file
    headers = {"User-Agent": "roiserve"} | ({"Range": f"bytes={present}-"} if present else {})
    try:
        response = _opener().open(Request(url, headers=headers), timeout=patience.timeout_seconds)
    except HTTPError as error:
        if error.code != _RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        return
    with response:
        is_rest = str(response.headers.get("Content-Range", "")).startswith(f"bytes {present}-")
        present = present if is_rest else 0
        length = str(response.headers.get("Content-Length", ""))
        # Anything else that a server says about the length is ignored.
        if length.isdecimal() and present + int(length) != size:
            page = ", a web page" if response.read1(1) == b"<" else ""
            path.unlink(missing_ok=True)
            raise ModelStoreError(
                f"{_printable(url)}: another file: expected {size:,} bytes, got {present + int(length):,}{page}"
            )
        try:
            # Unbuffered: with a buffer, a full disk would show up only when the file is closed.
            with path.open("ab" if is_rest else "wb", buffering=0) as file:
                _copy(response, file, present, size, on_progress, patience)
        except _WriteError as error:
            raise ModelStoreError(f"{path}: cannot be written: {error}") from error


class _WriteError(Exception):
    """A disk error, as opposed to a network error."""


def _copy(
    response: HTTPResponse, file: FileIO, present: int, size: int, on_progress: OnProgress, patience: Patience
) -> None:
    began_at, began_with = time.monotonic(), present
    while present < size and (chunk := response.read1(min(_CHUNK_BYTES, size - present))):
        _write_all(file, chunk)
        present += len(chunk)
        on_progress(present, size)
        if (now := time.monotonic()) - began_at > patience.period_seconds:
            if present - began_with < patience.least_bytes:
                raise ConnectionError(f"only {present - began_with:,} bytes came in {now - began_at:.0f} seconds")
            began_at, began_with = now, present
    if present < size:
        raise ConnectionError(f"the connection ended after {present:,} of {size:,} bytes")


def _write_all(file: FileIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        raise _WriteError(error.strerror) from error


def _check(source: str, path: Path, sha256: str) -> None:
    found = sha256_of(path)
    if found != sha256:
        with path.open("rb") as file:
            page = ", a web page instead of a file" if file.read(1) == b"<" else ""
        path.unlink()
        raise ModelStoreError(
            f"{source}: corrupted: expected the sha256 {sha256}, got {found}{page}. What came was deleted"
        )


class _WebOnly(HTTPRedirectHandler):
    """Follows redirects to http and https alone; urllib would go on to ftp."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        """The request for the new address."""
        if not newurl.startswith(("http://", "https://")):
            raise HTTPError(req.full_url, code, f"a redirect to neither http:// nor https://: {newurl}", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> OpenerDirector:
    return build_opener(_WebOnly)


def _printable(text: str) -> str:
    """What a server or a caller said, so that no terminal obeys it and no line is endless."""
    text = text if len(text) <= _MAX_REASON_LENGTH else f"{text[:_MAX_REASON_LENGTH]}…"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)
