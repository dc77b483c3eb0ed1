"""Exits 0 if the service in this container answers /healthz with 200, else 1 and says why: Docker's HEALTHCHECK."""

import http.client
import os
import sys


def main() -> int:
    """Ask the server on this host, on the port that it was told to listen on."""
    # Kubernetes sets ROISERVE_PORT=tcp://… for a Service named roiserve; the server ignores it, too.
    given = os.environ.get("ROISERVE_ADMIN_PORT") or os.environ.get("ROISERVE_PORT", "8000")
    port = int(given) if given.isdecimal() else 8000
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)  # not urllib, which would ask a proxy
    try:
        connection.request("GET", "/healthz")
        status = connection.getresponse().status
    except OSError as error:
        print(f"/healthz on port {port}: {error}", file=sys.stderr)
        return 1
    print(f"/healthz on port {port}: {status}")
    return 0 if status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
