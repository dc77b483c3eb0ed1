"""The Ray Serve application: `serve run service.cluster.application:build model_store=/models max_replicas=8`. Every
argument that is not a field of `ClusterArguments` is a setting of the service.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from service.app import create_app
from service.cluster.detector import ClusterDetector
from service.cluster.replica import DetectorReplica
from service.cluster.scaling import QueuedPixels
from service.logs import configure_logging
from service.settings import Settings
from service.workers.detector import PredictorFactory

_DETECTOR = "detector"


class ClusterArguments(BaseModel):
    """How the service is distributed; `Settings` configures each part."""

    model_config = ConfigDict(extra="allow", frozen=True)

    min_replicas: int = Field(1, ge=0, description="Fewest detector replicas.")
    max_replicas: int = Field(1, ge=1, description="Most detector replicas.")
    ingress_replicas: int = Field(1, ge=1, description="Replicas that speak HTTP; one keeps several detectors busy.")
    num_cpus: float = Field(1, ge=0, description="Cores that a detector replica reserves.")
    num_gpus: float = Field(0, ge=0, description="GPUs that a detector replica reserves; 0.5 lets two share one.")
    target_queue_pixels: float = Field(4e6, gt=0, description="Pixels that may wait at a replica before one is added.")
    downscale_delay_seconds: float = Field(60, ge=0, description="How long a replica must be superfluous to be ended.")
    max_queued_requests: int = Field(
        200, ge=1, description="Requests that one ingress replica holds back for busy replicas; more are refused (429)."
    )

    @property
    def settings(self) -> Settings:
        """The settings of the service."""
        return Settings(**(self.model_extra or {}))


def build(arguments: dict[str, Any]) -> Any:
    """The application, for `serve run` and for configuration files; takes the fields of `ClusterArguments`."""
    return build_application(ClusterArguments(**arguments))


def build_application(arguments: ClusterArguments, *, factory: PredictorFactory | None = None) -> Any:
    """Like `build`.

    Args:
        factory: loads the models in each worker process; None for the models in the store.
    """
    settings = arguments.settings
    drain_seconds = settings.drain_timeout_seconds + settings.drain_delay_seconds
    # Ray's default of 5 would never fill a batch. The ingress rejects requests before a replica has more than this.
    capacity = settings.max_queue_size + settings.max_batch_size
    detectors = serve.deployment(
        name=_DETECTOR,
        max_ongoing_requests=2 * capacity,  # this many for each priority
        max_queued_requests=arguments.max_queued_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1.0),
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=max(arguments.min_replicas, arguments.max_replicas),
            # Only current load counts, not that of half a minute ago; the policy itself delays scaling down.
            metrics_interval_s=1,
            look_back_period_s=3,
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(
                policy_function=QueuedPixels,
                policy_kwargs={
                    "target_pixels": arguments.target_queue_pixels,
                    "downscale_delay_seconds": arguments.downscale_delay_seconds,
                },
            ),
        ),
        graceful_shutdown_timeout_s=drain_seconds,
        health_check_period_s=5,
    )(DetectorReplica)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=arguments.ingress_replicas,
        max_ongoing_requests=max(1000, 2 * capacity * arguments.max_replicas),
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=drain_seconds,
    )(serve.ingress()(_Ingress))
    return ingress.bind(detectors.bind(settings, factory), settings)


class _Ingress:
    """The HTTP replica: the app, created on the replica because its locks and tasks cannot be serialized."""

    def __init__(self, detectors: DeploymentHandle[Any], settings: Settings) -> None:
        self._detectors = detectors
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        configure_logging(log_format=self._settings.log_format, log_level=self._settings.log_level)
        return create_app(self._settings, detector=lambda metrics: ClusterDetector(self._detectors, _DETECTOR, metrics))
