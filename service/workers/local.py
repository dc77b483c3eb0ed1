"""`LocalDetector`: batcher, threads and models, all in this process, whether that is a worker, the process that serves
HTTP, or a command.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from service import masks
from service.batching.batcher import Batcher
from service.batching.held_pixels import HeldPixels
from service.devices import choose_device, device_named
from service.errors import InferenceError, ModelStoreError, NotReadyError, OutOfMemoryError, ServiceError, first_line
from service.imaging.decode import ImageLimits, JpegDecoder
from service.imaging.jpeg_check import checked_decoder
from service.metrics import Observe
from service.pipeline import Pipeline, Predictor, ThreadTask, Work, release_memory, run_batch
from service.settings import Settings
from service.structures import Answer, Job, ModelInfo, Prediction
from service.workers.detector import PredictorFactory
from service.workers.stored import stored_key, stored_predictors
from service.workers.threads import WatchedThreads

logger = logging.getLogger(__name__)

# A tenth of the processor time of a thread with the usual priority, if both want all of it.
_BACKGROUND_NICENESS = 10
_NO_THREAD = "the device's thread has ended"


class LocalDetector:
    """See the module.

    Args:
        factory: loads the models.
        observe: records times and sizes.
    """

    def __init__(self, settings: Settings, factory: PredictorFactory, observe: Observe) -> None:
        self._settings = settings
        self._factory = factory
        self._observe = observe
        self._predictors: dict[str, Predictor] = {}
        self._busy_since: float | None = None
        self._device_failure: str | None = None
        self._decoders = WatchedThreads(settings.decode_threads, "decode")
        self._encoders = WatchedThreads(settings.decode_threads, "encode")
        self._background = WatchedThreads(settings.decode_threads, "background", niceness=_BACKGROUND_NICENESS)
        self.capacity = settings.max_queue_size + settings.max_batch_size
        self._batcher: Batcher[Work | ThreadTask, Prediction | None] = Batcher(
            self._run_batch,
            max_batch_size=settings.max_batch_size,
            max_batch_cost=settings.max_batch_pixels,
            max_queue_size=self.capacity,  # every admitted job has a place
            max_queue_cost=settings.max_queue_pixels,
            max_batch_wait_seconds=settings.max_batch_wait_ms / 1000,
            release_memory=release_memory,
        )
        self.pipeline = Pipeline(
            batcher=self._batcher,
            decoders=self._decoders,
            encoders=self._encoders,
            background=self._background,
            image_limits=ImageLimits(max_image_pixels=settings.max_image_pixels),
            held_pixels=HeldPixels(settings.max_held_pixels, resting=self._resting),
            predictors=self._predictors,
            observe=observe,
            batch_policy=settings.batch_policy,
            max_answer_bytes=settings.max_answer_bytes,
        )

    async def start(self) -> Sequence[ModelInfo]:
        """Load and warm up one model after the other. If the settings name no models, one that does not warm up is left
        out, as long as another one does.

        Raises:
            ServiceError: a model that the settings name does not warm up, or no model does; the factory raised it; or
                there is no such JPEG decoder as the settings name.
        """
        await self._batcher.start()
        await asyncio.to_thread(masks.warm_up)
        if self._settings.jpeg_decoder == "cuda":
            self.pipeline.jpeg_decoder = await asyncio.to_thread(self._device_decoder)
        broken: ServiceError | None = None
        predictors = self._factory(self._settings)
        # Keep no reference to a model that does not warm up, so that its memory can be released.
        while loaded := await asyncio.to_thread(lambda: list(itertools.islice(predictors, 1))):
            problem = await self._add(loaded.pop())
            if problem is not None and self._settings.models:
                raise problem
            broken = problem or broken
        if broken is not None and not self._predictors:
            raise broken
        return [predictor.info for predictor in self._predictors.values()]

    async def stop(self) -> None:
        """Stop at once; the results of work still on the device are dropped."""
        try:
            await self._batcher.stop(drain_timeout_seconds=0)
        finally:
            self._decoders.shutdown(wait=False, cancel_futures=True)
            self._encoders.shutdown(wait=False, cancel_futures=True)
            self._background.shutdown(wait=False, cancel_futures=True)

    async def run(self, job: Job) -> Answer:
        """Do a job; see `Pipeline.run`."""
        if self.breakdown is not None:
            raise NotReadyError(self.breakdown)
        return await self.pipeline.run(job)

    async def load(self, reference: str) -> ModelInfo:
        """Load a further model beside those that serve, and warm it up between their batches.

        Raises:
            ServiceError: it cannot be loaded, or does not warm up; it leaves nothing in memory.
        """
        if self._factory is stored_predictors:
            # Find out first whether it is loaded already, rather than build it a second time.
            reference = await asyncio.to_thread(stored_key, self._settings, reference)
        if reference in self._predictors:
            return self._predictors[reference].info
        settings = self._settings.model_copy(update={"models": (reference,), "default_model": None})
        loaded = await asyncio.to_thread(lambda: list(self._factory(settings)))
        key = loaded[0].info.key
        if key not in self._predictors:
            problem = await self._add(loaded.pop())
            if problem is not None:
                raise problem
        return self._predictors[key].info

    async def unload(self, model_key: str) -> None:
        """Unload a model and release its memory."""
        device = device_named(self._predictors[model_key].info.device)
        # No reference to the model may exist while its memory is released, not even a running method's `self`.
        del self._predictors[model_key]
        await asyncio.to_thread(device.release_memory)

    def waiting_pixels(self, model_key: str) -> Sequence[int]:
        """See `Pipeline.waiting_pixels`."""
        return self.pipeline.waiting_pixels(model_key)

    def memory(self) -> Mapping[tuple[str, str], float]:
        """Bytes by device and kind."""
        return {(label, kind): size for label in self._labels() for kind, size in device_named(label).memory().items()}

    def probe(self) -> None:
        """Run a tiny operation on every device. Has no timeout.

        Raises:
            RuntimeError: a device fails it, or the device thread has ended.
        """
        if self._batcher.has_failed:
            raise RuntimeError(_NO_THREAD)
        for label in self._labels():
            device_named(label).probe()

    @property
    def busy_seconds(self) -> float:
        """How long the oldest running batch, decoding or encoding has been running; 0 if none runs."""
        pools = (self._decoders, self._encoders, self._background)
        began = [one for one in (self._busy_since, *(pool.busy_since for pool in pools)) if one]
        return time.monotonic() - min(began) if began else 0.0

    @property
    def breakdown(self) -> str | None:
        """Why this process will answer nothing any more; None if it still can."""
        return self._device_failure or (_NO_THREAD if self._batcher.has_failed else None)

    @property
    def failure(self) -> str | None:
        """A breakdown, or a thread that has been busy with one thing for longer than is allowed to a worker, which
        would be replaced for it.
        """
        limit = self._settings.probe_timeout_seconds
        if self.breakdown is None and self.busy_seconds > limit:
            return f"a batch, a decoding or an encoding has been under way for more than {limit:g} s"
        return self.breakdown

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered soon."""
        return self.failure is None

    def _device_decoder(self) -> JpegDecoder | None:
        return checked_decoder(choose_device(self._settings.device).jpeg_decoder())

    @contextmanager
    def _resting(self) -> Iterator[None]:
        with self._decoders.resting(), self._background.resting():
            yield

    async def _add(self, predictor: Predictor) -> ServiceError | None:
        """Warm up a model and let it serve; if that fails, release its memory and return why."""
        key, device = predictor.info.key, device_named(predictor.info.device)
        problem: ServiceError | None = None
        try:
            await self.pipeline.run_on_device_thread(predictor.warm_up)
        except Exception as error:
            if isinstance(error, ServiceError) and not isinstance(error, InferenceError):
                problem = error.with_traceback(None)  # its frames would keep the model alive
                problem.__cause__ = problem.__context__ = None
            else:
                logger.info("a model cannot be warmed up", extra={"fields": {"model": key}}, exc_info=error)
                problem = ModelStoreError(f"{key} does not warm up: {first_line(error)}")
        if problem is None:
            self._predictors[key] = predictor
            logger.info("model ready", extra={"fields": {"model": key, "device": predictor.info.device}})
            return None
        logger.error("model does not warm up", extra={"fields": {"model": key, "reason": str(problem)}})
        del predictor
        await asyncio.to_thread(device.release_memory)
        return problem

    def _run_batch(self, batch: Sequence[Work | ThreadTask]) -> Sequence[Prediction | None]:
        if isinstance(batch[0], Work):  # a warm-up may take any time
            self._busy_since = time.monotonic()
        try:
            return run_batch(batch, observe=self._observe)
        except OutOfMemoryError:
            raise  # a full device is not dead, though it may fail the probe too
        except Exception:
            self._check_devices()
            raise
        finally:
            self._busy_since = None

    def _check_devices(self) -> None:
        """Notice when the device is lost: after some CUDA errors nothing works any more in this process."""
        try:
            self.probe()
        except RuntimeError as error:
            self._device_failure = f"the device does not answer any more: {error}"

    def _labels(self) -> set[str]:
        # Copy to a list first, which is atomic: the event loop adds and removes models, and other threads run this too.
        return {predictor.info.device for predictor in list(self._predictors.values())}
