"""Every Prometheus metric, declared once, in a registry that is passed in. Names have our prefix and base units. Labels
are bounded: routes are patterns, models are the loaded ones, all others are words of our own.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Literal, Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from service.structures import ModelInfo

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64, 128)
_RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
_COUNTS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


Observed = Literal[
    "stage_duration", "batch_size", "batch_padding_ratio", "detections", "overflowed_batches", "uncompiled_batches"
]
Observation = tuple[Observed, Sequence[str], float, str | None]
"""The arguments of an `Observe`, on their way to another process."""


class Observe(Protocol):
    """Takes a device worker's observations, into the metrics or to the process that holds them."""

    def __call__(self, name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
        """Count a value in the histogram, or add it to the counter, that `Metrics` calls by this name.

        Args:
            trace_id: of a request that the value is from, to become the exemplar of the histogram's bucket.
        """


class Metrics:
    """The metrics of one app.

    Args:
        registry: where they are registered; a fresh one for each app, so that two apps in a process do not collide.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        # Otherwise a series `…_created` beside each of ours would double their number. Applies to the whole process.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # without annotations
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "roiserve_requests_total", "Answered HTTP requests.", ("route", "status"), registry=registry
        )
        self.request_duration = Histogram(
            "roiserve_request_duration_seconds",
            "Time from a request's headers to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_duration = Histogram(
            "roiserve_stage_duration_seconds",
            "Time in one stage: of an image for decode, queue and encode, of a whole batch for the others.",
            ("stage", "model"),
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "roiserve_batch_size",
            "Images that shared a batch.",
            ("model",),
            buckets=_POWERS_OF_TWO,
            registry=registry,
        )
        self.batch_padding_ratio = Histogram(
            "roiserve_batch_padding_ratio",
            "Padded pixels among all pixels of a batch.",
            ("model",),
            buckets=_RATIOS,
            registry=registry,
        )
        self.queue_depth = Gauge(
            "roiserve_queue_depth", "Images waiting for the device.", ("model",), registry=registry
        )
        self.queue_pixels = Gauge(
            "roiserve_queue_pixels", "Pixels of the images waiting, resized and padded.", ("model",), registry=registry
        )
        self.images = Counter(
            "roiserve_images_total",
            "Images by outcome: ok, or the code of the error.",
            ("model", "outcome"),
            registry=registry,
        )
        self.detections = Histogram(
            "roiserve_detections_per_image",
            "Detections in the answer for an image.",
            ("model",),
            buckets=_COUNTS,
            registry=registry,
        )
        self.cancelled = Counter(
            "roiserve_cancelled_total",
            "Images whose caller went away, by the stage they were in.",
            ("stage",),
            registry=registry,
        )
        self.rejected = Counter(
            "roiserve_rejected_total",
            "Requests refused before any work, by the code of the error.",
            ("reason",),
            registry=registry,
        )
        self.model_info = Gauge(
            "roiserve_model_info",
            "What is loaded; always 1.",
            ("model", "version", "architecture", "roi_op", "engine", "precision", "device"),
            registry=registry,
        )
        self.model_ready = Gauge(
            "roiserve_model_ready", "Whether a model is loaded and warmed up.", ("model",), registry=registry
        )
        self.model_verification = Gauge(
            "roiserve_model_verification_ratio",
            "Largest difference of boxes, scores, masks or recordings from the reference at load, as a share of the "
            "tolerance; above 1 another engine replaced the requested one.",
            ("model", "value"),
            registry=registry,
        )
        self.overflowed_batches = Counter(
            "roiserve_overflowed_batches_total",
            "Batches that half precision could not hold, and that ran again in float32.",
            ("model",),
            registry=registry,
        )
        self.uncompiled_batches = Counter(
            "roiserve_uncompiled_batches_total",
            "Batches of the engine compiled of which a part ran uncompiled, since they fit no code from the warm-up.",
            ("model",),
            registry=registry,
        )
        self.device_memory = Gauge(
            "roiserve_device_memory_bytes",
            "Memory of a device: allocated, reserved and total of a GPU, resident of the workers on a CPU.",
            ("device", "kind"),
            registry=registry,
        )
        self.worker_restarts = Counter(
            "roiserve_worker_restarts_total",
            "Device workers that were replaced: killed by a signal, crashed, hung, or start_failed.",
            ("reason",),
            registry=registry,
        )
        self.ready = Gauge(
            "roiserve_ready", "Whether the server takes requests, as /readyz says: 1 or 0.", registry=registry
        )
        self.queue_limit_images = Gauge(
            "roiserve_queue_limit_images",
            "Most images that may wait for the device: max_queue_size.",
            registry=registry,
        )
        self.queue_limit_pixels = Gauge(
            "roiserve_queue_limit_pixels",
            "Most pixels that may wait for the device, resized and padded: max_queue_pixels.",
            registry=registry,
        )
        self.build_info = Gauge(
            "roiserve_build_info", "The running program; always 1.", ("version", "python"), registry=registry
        )
        self.build_info.labels(version("roiserve"), platform.python_version()).set(1)

    def add_model(
        self, info: ModelInfo, *, queue_depth: Callable[[], float], queue_pixels: Callable[[], float]
    ) -> None:
        """Add the series of a loaded model, so that they start at zero rather than at the first event.

        Args:
            queue_depth: returns how many images wait for it; called at each scrape.
            queue_pixels: returns how many padded pixels these have; called at each scrape.
        """
        self.model_info.labels(*_info_labels(info)).set(1)
        self.model_ready.labels(info.key).set(1)
        self.images.labels(info.key, "ok")
        self.overflowed_batches.labels(info.key)
        self.uncompiled_batches.labels(info.key)
        if info.verification is not None:
            for name, value in info.verification.values.items():
                self.model_verification.labels(info.key, name).set(value.difference / value.tolerance)
        self.queue_depth.labels(info.key).set_function(queue_depth)
        self.queue_pixels.labels(info.key).set_function(queue_pixels)

    def remove_model(self, info: ModelInfo) -> None:
        """Remove the gauges of a model that was unloaded; its counters and histograms stay."""
        self.model_info.remove(*_info_labels(info))
        for gauge in (self.model_ready, self.queue_depth, self.queue_pixels):
            gauge.remove(info.key)
        for name in () if info.verification is None else info.verification.values:
            self.model_verification.remove(info.key, name)

    def observe(self, name: Observed, labels: Sequence[str], value: float, trace_id: str | None = None) -> None:
        """See `Observe`."""
        metric: Histogram | Counter = getattr(self, name)
        if isinstance(metric, Counter):
            metric.labels(*labels).inc(value)
        else:
            metric.labels(*labels).observe(value, exemplar_of(trace_id))

    def set_device_memory(self, sizes: Mapping[tuple[str, str], float]) -> None:
        """Replace the memory of all devices: bytes by device and kind."""
        self.device_memory.clear()
        for labels, size in sizes.items():
            self.device_memory.labels(*labels).set(size)


def exemplar_of(trace_id: str | None) -> dict[str, str] | None:
    """An observation's exemplar: the request's trace, if it has one."""
    return None if trace_id is None else {"trace_id": trace_id}


def _info_labels(info: ModelInfo) -> tuple[object, ...]:
    return info.key, info.version, info.architecture, info.roi_op, info.engine, info.precision, info.device
