"""The client for programs with threads, or with one."""

from __future__ import annotations

import ssl
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Event
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


class Client:
    """Speaks to one server; threads may share it. Use it in a `with` block, or close it.

    Args:
        url: of the server, with the path of a proxy's prefix if there is one.
        api_key: if the server wants one.
        timeout: the seconds that a call may take, all attempts and pauses together. The server is told, and gives up
            earlier than that if it must.
        retries: how often a call is tried again after 408, 429, 502, 503, 504 and broken connections.
        verify: False, or a context of `ssl` for certificates of your own.
        transport: what carries the requests, such as `httpx.MockTransport` in tests; the network if None.

    All calls raise `ProblemError`, `DeadlineExceededError`, `NoAnswerError` and `UnexpectedAnswerError`, and those that
    take images OSError and `ImageError`.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        retries: int = DEFAULT_RETRIES,
        verify: bool | ssl.SSLContext = True,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._timeout_seconds = timeout
        self._retries = retries
        self._http = httpx.Client(
            base_url=checked_url(url),
            headers=base_headers(api_key),
            verify=verify,
            transport=transport,
            limits=NO_LIMITS,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """The loaded models."""
        return self._run(MODELS_CALL, timeout)

    def detect(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[DetectOptions],
    ) -> Answer:
        """Find the objects in one image.

        Args:
            image: a path, the bytes of a file, an open binary file, an RGB array or a PIL image.
            timeout: the seconds for this call; the client's if None.
            request_id: for the server's log; one of the server's own if None.
            options: see `DetectOptions`.
        """
        return self._run(detect_call(read_image(image), image, options, request_id), timeout)

    def annotate(
        self,
        image: ImageLike,
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[AnnotateOptions],
    ) -> bytes:
        """The image with its objects drawn, as the bytes of a PNG or JPEG file; arguments as in `detect`."""
        return self._run(annotate_call(read_image(image), image, options, request_id), timeout)

    def detect_batch(
        self,
        images: Sequence[ImageLike],
        *,
        timeout: float | None = None,
        request_id: str | None = None,
        **options: Unpack[DetectOptions],
    ) -> list[Answer | ProblemError]:
        """Find the objects in several images with one request, which share its deadline; arguments as in `detect`.

        For many images `detect_many` is better: each has a deadline of its own and is tried again alone.

        Returns:
            For each image, in order, an answer, or an error, which is not raised.
        """
        if not images:
            return []
        return self._run(batch_call(read_images(images), options, request_id), timeout)

    def detect_many(
        self,
        images: Iterable[ImageLike],
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        **options: Unpack[DetectOptions],
    ) -> Generator[Outcome, None, None]:
        """Find the objects in many images, so many at a time, and yield each outcome when it comes.

        Images are taken as they are needed, so there may be any number of them, also without end. An image that fails
        is an outcome with an error, and the others go on.

        Args:
            images: as in `detect`.
            timeout: for each image.

        Yields:
            Outcomes in the order in which they come; `index` says of which image.
        """
        split_options(options)  # what is wrong with them is raised here, once
        return self._many(images, checked_concurrency(concurrency), timeout, options)

    def _many(
        self, images: Iterable[ImageLike], concurrency: int, timeout: float | None, options: DetectOptions
    ) -> Generator[Outcome, None, None]:
        source, under_way = enumerate(images), 0
        stop, come = Event(), SimpleQueue[Future[Outcome]]()

        def detect_one(index: int, image: ImageLike) -> Outcome:
            try:
                call = detect_call(read_image(image), image, options, None)
                return Outcome(index, image, answer=self._run(call, timeout, stop))
            except (RoIServeError, OSError) as error:
                return Outcome(index, image, error=error)

        with ThreadPoolExecutor(concurrency) as threads:
            try:
                while True:
                    # Twice as many as are in flight, so that the threads go on while the caller looks at an outcome.
                    while under_way < 2 * concurrency and come.empty() and (item := next(source, None)) is not None:
                        threads.submit(detect_one, *item).add_done_callback(come.put)
                        under_way += 1
                    if not under_way:
                        return
                    outcome = come.get().result()
                    under_way -= 1
                    yield outcome
            finally:
                stop.set()
                threads.shutdown(cancel_futures=True)

    def detect_folder(
        self,
        folder: str | Path,
        out: str | Path,
        *,
        concurrency: int = 8,
        timeout: float | None = None,
        progress: bool = False,
        **options: Unpack[DetectOptions],
    ) -> FolderSummary:
        """Find the objects in all pictures of a folder and of those below it, and write them to a file as they come.

        Each line of the file is a JSON object: `file` relative to the folder, `options`, and the answer or an `error`.
        If the file exists, it is continued: pictures that have an answer in it are left out. `read_results` reads it,
        `write_coco_results` turns it into COCO's results.

        Args:
            progress: whether to write a line about it to standard error.

        Raises:
            UnreachableError: no connection to the server. What was written stays, and a second call goes on there.
            ProblemError: the server wants another key, has no such model, or does not take these options.
            ResultsFileError: the file was written with other options, or is no file of results.
        """
        with FolderRun(Path(folder), Path(out), options, progress=progress) as run:
            outcomes = self.detect_many(run.paths, concurrency=concurrency, timeout=timeout, **options)
            with closing(outcomes):
                for outcome in outcomes:
                    run.add(outcome)
        return run.summary

    def _run(self, call: Call[T], timeout: float | None, stop: Event | None = None) -> T:
        """Carry out the steps of a call; pauses end early when `stop` is set."""
        seconds = self._timeout_seconds if timeout is None else timeout
        script = steps(call, timeout_seconds=seconds, retries=self._retries)
        step = next(script)
        try:
            while True:
                if not isinstance(step, Pause):
                    step = script.send(self._send(call, step.seconds))
                elif stop is None:
                    time.sleep(step.seconds)
                    step = script.send(None)
                elif stop.wait(step.seconds):
                    script.close()
                    raise RoIServeError("cancelled")
                else:
                    step = script.send(None)
        except StopIteration as finished:
            answer: T = finished.value
            return answer

    def _send(self, call: Call[T], seconds: float) -> Reply | httpx.RequestError | TimeoutError:
        deadline = time.monotonic() + seconds
        try:
            response = self._http.send(call.request(self._http, seconds), stream=True)
            try:
                chunks = []
                # The timeout of httpx is for one read; this one is for all of them.
                for chunk in response.iter_bytes():
                    chunks.append(chunk)
                    if time.monotonic() > deadline:
                        return TimeoutError("the answer came too slowly")
            finally:
                response.close()
        except httpx.RequestError as error:
            return error
        return Reply(response.status_code, response.headers, b"".join(chunks))
