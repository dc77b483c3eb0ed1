"""The client for asyncio."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx

from roiserve_client.answers import Answer, Model
from roiserve_client.calls import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_SECONDS,
    MODELS_CALL,
    NO_LIMITS,
    Call,
    Pause,
    Reply,
    annotate_call,
    base_headers,
    batch_call,
    checked_concurrency,
    checked_url,
    detect_call,
    read_images,
    steps,
)
from roiserve_client.errors import ProblemError, RoIServeError
from roiserve_client.images import ImageLike, read_image
from roiserve_client.options import AnnotateOptions, DetectOptions, split_options
from roiserve_client.results import FolderRun, FolderSummary, Outcome

T = TypeVar("T")


class AsyncClient:
    """`Client` for asyncio: the same arguments, methods and errors. Use it in an `async with` block, or close it.

    Files are read, and pixels encoded, in threads.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retries: int = DEFAULT_RETRIES,
        verify: bool | ssl.SSLContext = True,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._timeout_seconds = timeout
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=checked_url(url),
            headers=base_headers(api_key),
            verify=verify,
            transport=transport,
            limits=NO_LIMITS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def models(self, *, timeout: float | None = None) -> list[Model]:
        """As `Client.models`."""
        return await self._run(MODELS_CALL, timeout)

    async def detect(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[DetectOptions],
    ) -> Answer:
        """As `Client.detect`."""
        data = await asyncio.to_thread(read_image, image)
        return await self._run(detect_call(data, image, options, request_id), timeout)

    async def annotate(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[AnnotateOptions],
    ) -> bytes:
        """As `Client.annotate`."""
        data = await asyncio.to_thread(read_image, image)
        return await self._run(annotate_call(data, image, options, request_id), timeout)

    async def detect_batch(
        self,
        images: Sequence[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[DetectOptions],
    ) -> list[Answer | ProblemError]:
        """As `Client.detect_batch`."""
        if not images:
            return []
        read = await asyncio.to_thread(read_images, images)
        return await self._run(batch_call(read, options, request_id), timeout)

    def detect_many(
        self,
        images: Iterable[ImageLike],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        **options: Unpack[DetectOptions],
    ) -> AsyncGenerator[Outcome, None]:
        """As `Client.detect_many`; `async for` goes over the outcomes."""
        split_options(options)  # what is wrong with them is raised here, once
        return self._many(images, checked_concurrency(concurrency), timeout, options)

    async def _many(
        self, images: Iterable[ImageLike], concurrency: int, timeout: float | None, options: DetectOptions
    ) -> AsyncGenerator[Outcome, None]:
        source = enumerate(images)
        places, come = asyncio.Semaphore(concurrency), asyncio.Queue[asyncio.Task[Outcome]]()
        under_way: set[asyncio.Task[Outcome]] = set()

        async def detect_one(index: int, image: ImageLike) -> Outcome:
            async with places:
                try:
                    return Outcome(index, image, answer=await self.detect(image, timeout=timeout, **options))
                except (RoIServeError, OSError) as error:
                    return Outcome(index, image, error=error)

        try:
            while True:
                # As in `Client`: some more than are in flight.
                while len(under_way) < 2 * concurrency and come.empty() and (item := next(source, None)) is not None:
                    task = asyncio.create_task(detect_one(*item))
                    task.add_done_callback(come.put_nowait)
                    under_way.add(task)
                if not under_way:
                    return
                done = await come.get()
                under_way.remove(done)
                yield done.result()
        finally:
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def detect_folder(
        self,
        folder: str | Path,
        out: str | Path,
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        progress: bool = False,
        **options: Unpack[DetectOptions],
    ) -> FolderSummary:
        """As `Client.detect_folder`."""
        with FolderRun(Path(folder), Path(out), options, progress=progress) as run:
            outcomes = self.detect_many(run.paths, concurrency=concurrency, timeout=timeout, **options)
            async with aclosing(outcomes):
                async for outcome in outcomes:
                    run.add(outcome)
        return run.summary

    async def _run(self, call: Call[T], timeout: float | None) -> T:
        seconds = self._timeout_seconds if timeout is None else timeout
        script = steps(call, timeout_seconds=seconds, retries=self._retries)
        step = next(script)
        try:
            while True:
                if isinstance(step, Pause):
                    await asyncio.sleep(step.seconds)
                    step = script.send(None)
                else:
                    step = script.send(await self._send(call, step.seconds))
        except StopIteration as finished:
            answer: T = finished.value
            return answer

    async def _send(self, call: Call[T], seconds: float) -> Reply | httpx.RequestError | TimeoutError:
        try:
            async with asyncio.timeout(seconds):
                response = await self._http.send(call.request(self._http, seconds))
        except (httpx.RequestError, TimeoutError) as error:
            return error
        return Reply(response.status_code, response.headers, response.content)
