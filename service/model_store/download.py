"""Downloads one file over HTTP: goes on where it stopped, and lets it stay only if its hash is right. Called by
`pull.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from service.errors import ModelStoreError
from service.model_store.files import sha256_of

OnProgress = Callable[[int, int | None], None]
"""Is told the bytes that are there and the bytes that there will be, None where the server does not say."""

_CHUNK_BYTES = 1 << 18
_RANGE_NOT_SATISFIABLE = 416


def download(
    url: str,
    path: Path,
    *,
    sha256_prefix: str,
    on_progress: OnProgress,
    tries: int = 5,
    timeout_seconds: float = 30.0,
) -> None:
    """Download a file, or the rest of it if a part lies at `path` already.

    Args:
        path: a file with the right hash is left alone; a part is kept when the download fails, and thrown away when it
            turns out to be of something else.
        sha256_prefix: the first digits of the whole file's sha256.
        tries: how often a broken connection is opened again.
        timeout_seconds: for how long a server may say nothing, until the connection counts as broken.

    Raises:
        ModelStoreError: refused by the server, still incomplete after all tries, or not what it should be.
    """
    if not url.startswith(("http://", "https://")):
        raise ModelStoreError(f"expected a URL with http:// or https://, got {url}")
    if path.exists() and sha256_of(path).startswith(sha256_prefix):
        return
    problem = ""
    for _ in range(tries):
        try:
            _fetch_rest(url, path, on_progress, timeout_seconds)
            break
        except HTTPError as error:
            if error.code < 500:
                raise ModelStoreError(f"{url}: refused by the server: {error.code} {error.reason}") from error
            problem = f"{error.code} {error.reason}"
        except (URLError, HTTPException, ConnectionError, TimeoutError, SSLError) as error:
            problem = str(error)
        except OSError as error:
            raise ModelStoreError(f"{path}: cannot be written: {error.strerror}") from error
    else:
        raise ModelStoreError(f"{url}: not complete after {tries} tries, the last: {problem}. Run it again to go on")
    _check(url, path, sha256_prefix)


def _fetch_rest(url: str, path: Path, on_progress: OnProgress, timeout_seconds: float) -> None:
    """Append what the file lacks; all of it where the server does not do parts.

    Raises:
        ConnectionError: the connection ended early.
        HTTPError, URLError, HTTPException, OSError: as `urlopen` and files do.
    """
    present = path.stat().st_size if path.exists() else 0
    headers = {"User-Agent": "roiserve"} | ({"Range": f"bytes={present}-"} if present else {})
    try:
        response = urlopen(Request(url, headers=headers), timeout=timeout_seconds)
    except HTTPError as error:
        if error.code == _RANGE_NOT_SATISFIABLE:
            return  # nothing is left to fetch; the hash will tell whether it is the right thing
        raise
    with response:
        is_rest = str(response.headers.get("Content-Range", "")).startswith(f"bytes {present}-")
        present = present if is_rest else 0
        length = response.headers.get("Content-Length")
        total = present + int(length) if length else None
        with path.open("ab" if is_rest else "wb") as file:
            while chunk := response.read1(_CHUNK_BYTES):
                file.write(chunk)
                present += len(chunk)
                on_progress(present, total)
    if total is not None and present < total:
        raise ConnectionError(f"the connection ended after {present:,} of {total:,} bytes")


def _check(url: str, path: Path, sha256_prefix: str) -> None:
    sha256 = sha256_of(path)
    if not sha256.startswith(sha256_prefix):
        with path.open("rb") as file:
            page = ", a web page instead of a file" if file.read(1) == b"<" else ""
        path.unlink()
        raise ModelStoreError(
            f"{url}: corrupted: expected a sha256 that starts with {sha256_prefix}, got {sha256}{page}. "
            "What came was deleted"
        )
