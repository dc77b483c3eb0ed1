"""How many replicas the cluster should run: enough that no replica's queue grows too long. The queue is measured in
pixels, not requests, because a picture of 12 megapixels costs far more than one of 0.3.
"""

from __future__ import annotations

import math
from typing import Any


class QueuedPixels:
    """A policy for Ray Serve's autoscaler: scales up immediately, and down gradually.

    Args:
        target_pixels: pixels, resized and padded, that may wait at each replica.
        downscale_delay_seconds: how long replicas must have been superfluous before half of them are removed.
    """

    def __init__(self, target_pixels: float, downscale_delay_seconds: float) -> None:
        self._target_pixels = target_pixels
        self._downscale_delay_seconds = downscale_delay_seconds

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas, within the deployment's bounds, and the state to keep until the next call.

        Args:
            context: Ray's `AutoscalingContext`.
        """
        metrics = context.aggregated_metrics or {}
        wanted, idle_since = self.wanted(
            waiting=sum(metrics.get("queue_pixels", {}).values()),
            ongoing=context.total_num_requests,
            replicas=context.target_num_replicas,
            now=context.current_time,
            idle_since=context.policy_state.get("idle_since"),
        )
        lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(lowest, min(highest, wanted)), {"idle_since": idle_since}

    def wanted(
        self, *, waiting: float, ongoing: float, replicas: int, now: float, idle_since: float | None
    ) -> tuple[int, float | None]:
        """The scaling rule.

        Args:
            waiting: pixels waiting at all replicas together.
            ongoing: requests in flight.
            replicas: the current target number.
            now: seconds.
            idle_since: since when there has been a superfluous replica without interruption; None if there is none.

        Returns:
            The new target number, and `idle_since` for the next call.
        """
        if waiting > self._target_pixels * replicas:
            return math.ceil(waiting / self._target_pixels), None
        if waiting > 0 or ongoing >= replicas:
            return max(1, replicas), None
        idle_since = now if idle_since is None else idle_since
        if now - idle_since < self._downscale_delay_seconds:
            return max(1, replicas), idle_since
        superfluous = replicas - ongoing
        return max(1, replicas - max(1, int(superfluous // 2))), now
