"""Fetches the images of tasks from the one Label Studio that the settings name. Addresses come from whoever may send
tasks, so nothing else is ever asked: no other host, no other part of that server, and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import TypeVar
from urllib.parse import quote, unquote, urlsplit

from service.api.errors import ImageNotFetchedError
from service.batching.held_bytes import Holding
from service.errors import DeadlineExceededError, TooLargeError
from service.settings import Settings

T = TypeVar("T")

# Where Label Studio keeps uploaded files and those of local storages.
_PREFIXES = ("/data/", "/storage-data/")
_REFRESH_PATH = "/api/token/refresh"
# Threads of their own: a Label Studio that does not answer must not occupy those that parse everybody's requests.
_THREADS = 8
_FETCH_SECONDS = 15.0
_CHUNK_BYTES = 256 * 1024
_MAX_TOKEN_BYTES = 64 * 1024
# Label Studio's tokens for access are valid for five minutes.
_TOKEN_SECONDS = 60.0


class LabelStudioImages:
    """See the module.

    Args:
        url: of Label Studio, perhaps with a path; no slash at the end.
        key: a user's access token: a legacy one, or a personal one, which is exchanged for one of a few minutes.
        max_bytes: largest image.
    """

    def __init__(self, url: str, key: str | None, *, max_bytes: int) -> None:
        self._base = urlsplit(url)
        self._key = key
        self._max_bytes = max_bytes
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="label-studio")
        self._token, self._token_until = "", 0.0

    async def fetch(self, address: str, *, deadline: float, holding: Holding) -> bytes:
        """The bytes at an address: a path of Label Studio's, or a whole URL of the same server.

        Args:
            deadline: in seconds of `time.monotonic`.
            holding: grows by the image.

        Raises:
            ImageNotFetchedError: not an address to be asked, or Label Studio did not answer it with an image in time.
            TooLargeError: the image is larger than a body may be.
            OverloadedError: all requests together would hold too much.
            DeadlineExceededError: the deadline passed first.
        """
        path = self._path_of(address)
        seconds_left = deadline - time.monotonic()
        try:
            async with asyncio.timeout(min(seconds_left, _FETCH_SECONDS)):
                return await self._get(path, holding)
        except TimeoutError:
            if seconds_left < _FETCH_SECONDS:
                raise DeadlineExceededError("the deadline passed while an image was fetched", stage="fetch") from None
            raise ImageNotFetchedError(f"{path[:100]}: Label Studio took more than {_FETCH_SECONDS:g} s") from None
        except (OSError, HTTPException) as error:
            raise ImageNotFetchedError(f"{path[:100]}: Label Studio cannot be reached: {error!r}") from None

    def _path_of(self, address: str) -> str:
        """The path and query to ask for."""
        expected = f"expected an address at {self._base.geturl()}, or a path there that begins with /data/"
        try:
            parts = urlsplit(address)
            is_ours = parts.scheme in ("", self._base.scheme) and parts.netloc in ("", self._base.netloc)
        except ValueError:
            is_ours = False
        if not is_ours or bool(parts.scheme) != bool(parts.netloc):
            raise ImageNotFetchedError(f"{expected}; got {address[:200]!r}, and nothing else is fetched")
        prefix = self._base.path
        path = parts.path.removeprefix(prefix) if parts.path.startswith(f"{prefix}/") else parts.path
        plain = unquote(path)
        is_plain = plain.isprintable() and "\\" not in plain and ".." not in plain.split("/")
        if not (path.startswith(_PREFIXES) and is_plain):
            raise ImageNotFetchedError(f"{expected}; got {address[:200]!r}")
        query = f"?{quote(parts.query, safe='%/:?@!$&()*+,;=')}" if parts.query else ""
        return f"{prefix}{quote(path, safe='%/:@!$&()*+,;=')}{query}"

    async def _get(self, path: str, holding: Holding) -> bytes:
        headers = {} if self._key is None else {"Authorization": await self._authorization(self._key)}
        return await self._request("GET", path, None, headers, max_bytes=self._max_bytes, holding=holding)

    async def _authorization(self, key: str) -> str:
        if key.count(".") != 2:
            return f"Token {key}"
        if time.monotonic() >= self._token_until:
            body, headers = json.dumps({"refresh": key}), {"Content-Type": "application/json"}
            path = f"{self._base.path}{_REFRESH_PATH}"
            answer = await self._request("POST", path, body, headers, max_bytes=_MAX_TOKEN_BYTES)
            try:
                self._token = str(json.loads(answer)["access"])
            except (ValueError, KeyError, TypeError):
                raise ImageNotFetchedError("Label Studio did not exchange the access token for another") from None
            self._token_until = time.monotonic() + _TOKEN_SECONDS
        return f"Bearer {self._token}"

    async def _request(
        self,
        method: str,
        path: str,
        body: str | None,
        headers: dict[str, str],
        *,
        max_bytes: int,
        holding: Holding | None = None,
    ) -> bytes:
        connect = HTTPSConnection if self._base.scheme == "https" else HTTPConnection
        # The time limit of each step; whoever sends a byte now and then is cut off by that of the whole.
        connection = connect(self._base.netloc, timeout=_FETCH_SECONDS)
        connected, chunks, size = None, [], 0
        try:
            await self._in_thread(lambda: connection.request(method, path, body, headers))
            connected = connection.sock
            response = await self._in_thread(connection.getresponse)
            _check_answer(path, response, max_bytes)
            while chunk := await self._in_thread(lambda: response.read1(_CHUNK_BYTES)):
                if size + len(chunk) > max_bytes:
                    raise TooLargeError(f"{path[:100]}: the image has more than the {max_bytes} bytes that are read")
                if holding is not None:
                    holding.add(len(chunk))
                size += len(chunk)
                chunks.append(chunk)
            if response.length:
                raise ImageNotFetchedError(f"{path[:100]}: Label Studio broke off after {size} bytes")
            return b"".join(chunks)
        except BaseException:
            if holding is not None:
                holding.release(size)
            raise
        finally:
            # Wakes a thread that still waits for an answer.
            if connected is not None:
                with suppress(OSError):
                    connected.shutdown(socket.SHUT_RDWR)
            connection.close()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)


def label_studio_images(settings: Settings) -> LabelStudioImages | None:
    """What fetches images from the Label Studio of the settings; None if they name none."""
    if settings.label_studio_url is None:
        return None
    key = settings.label_studio_api_key
    return LabelStudioImages(
        settings.label_studio_url.rstrip("/"),
        None if key is None else key.get_secret_value(),
        max_bytes=settings.max_body_bytes,
    )


def _check_answer(path: str, response: HTTPResponse, max_bytes: int) -> None:
    """Refuse an answer, before its body, that is no success or is too long."""
    if 300 <= response.status < 400:
        raise ImageNotFetchedError(f"{path[:100]}: Label Studio redirects, perhaps to a login; that is not followed")
    if response.status != 200:
        hint = "; see label_studio_api_key" if response.status in (401, 403) else ""
        raise ImageNotFetchedError(f"{path[:100]}: Label Studio answered {response.status} {response.reason}{hint}")
    if response.length is not None and response.length > max_bytes:
        raise TooLargeError(f"{path[:100]}: the image has {response.length} bytes, at most {max_bytes} are read")
