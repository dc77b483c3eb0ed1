"""Decides which other origins' pages may call this server from a browser (CORS). Never with cookies, only with keys."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Response
from starlette.datastructures import Headers

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, X-API-Key, X-Request-ID",
    "Access-Control-Max-Age": "600",
}
_EXPOSED = "X-Request-ID, Server-Timing, Retry-After"


class CrossOrigin:
    """The CORS headers and preflight answers for browsers.

    Args:
        origins: `https://app.example.com` and the like, or `*` for all; empty to switch CORS off.
    """

    def __init__(self, origins: Sequence[str]) -> None:
        self._origins = frozenset(origins)

    def headers(self, request: Headers) -> dict[str, str]:
        """The headers to add to any answer to this request."""
        if not self._origins:
            return {}
        if "*" in self._origins:
            return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": _EXPOSED}
        origin = request.get("origin", "")
        if origin not in self._origins:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Expose-Headers": _EXPOSED,
            "Vary": "Origin",
        }

    def preflight(self, method: str, request: Headers) -> Response | None:
        """The answer to a browser's preflight request; None if this request is not one."""
        if not self._origins or method != "OPTIONS" or "access-control-request-method" not in request:
            return None
        return Response(status_code=204, headers=_PREFLIGHT)
