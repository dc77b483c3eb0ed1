"""A Ray cluster on this machine that serves a fake model: prints its address, then obeys `kill`, which ends a detector
replica, and `replicas`, which prints how many run; ends with its input.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import ray
from ray import serve
from ray.util import list_named_actors

from service.cluster.application import ClusterArguments, build_application
from tests.fakes import load_fakes
from tests.integration.test_metrics_page import free_port


def replicas() -> list[str]:
    """The names of the detector replicas' actors."""
    found: list[dict[str, Any]] = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in found if "#detector#" in actor["name"]]


def main() -> None:
    """See the module."""
    arguments = ClusterArguments(**json.loads(sys.argv[1]))
    port = free_port()
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build_application(arguments, factory=load_fakes), route_prefix="/")
    print(f"http://127.0.0.1:{port}", flush=True)
    for line in sys.stdin:
        if line.strip() == "kill":
            ray.kill(ray.get_actor(replicas()[0], namespace="serve"), no_restart=False)
        print(len(replicas()), flush=True)
    ray.shutdown()


if __name__ == "__main__":
    main()
