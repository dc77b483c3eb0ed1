"""The route `/`: a page on which people try the service, and the addresses in JSON for programs. The page is the files
of the folder `page`, as they are: HTML, CSS, ES modules and three example pictures.
"""

from __future__ import annotations

import hashlib
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import PurePath
from string import Template

from fastapi import APIRouter, Request, Response

from service.api.docs import page_headers
from service.api.errors import RouteNotFoundError
from service.api.schemas import json_response
from service.api.state import ApiState

router = APIRouter(include_in_schema=False)

_PATHS = {
    "docs": "/docs",
    "models": "/v1/models",
    "openapi": "/openapi.json",
    "ready": "/readyz",
    "metrics": "/metrics",
}
# What people look at, of these.
_LINKS = {"docs": "API", "models": "Models", "metrics": "Metrics"}
_FOLDER = files(__package__) / "page"
_MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".jpg": "image/jpeg",
    ".js": "text/javascript",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
# Nothing inline, nothing from elsewhere, and no text that becomes markup.
_POLICIES = ("script-src 'self'", "style-src 'self'", "require-trusted-types-for 'script'")


@router.get("/")
async def start(request: Request) -> Response:
    """The page if the caller is a browser, else JSON."""
    state: ApiState = request.app.state.api
    paths = dict(_PATHS)
    if state.settings.admin_port is not None:
        del paths["ready"], paths["metrics"]  # those are on the admin port
    vary = {"Vary": "Accept"}
    version = request.app.version
    if "text/html" not in request.headers.get("accept", ""):
        root = request.scope.get("root_path", "")
        addresses = {name: f"{root}{path}" for name, path in {"detect": "/v1/detect", **paths}.items()}
        answer = json_response({"name": "RoIServe", "version": version, **addresses})
        answer.headers.update(vary)
        return answer
    page = Template(_read("index.html").decode()).substitute(
        version=escape(version),
        # Relative, as all addresses in the page: it need not know under which path a proxy publishes it.
        links=" ".join(f'<a href="{paths[name][1:]}">{title}</a>' for name, title in _LINKS.items() if name in paths),
        settings=_describe(state),
    )
    return _answer(request, page.encode(), "text/html", page_headers(*_POLICIES) | vary)


@router.get("/page/{name}")
async def page_file(request: Request, name: str) -> Response:
    """One file of the page."""
    media_type = _MEDIA_TYPES.get(PurePath(name).suffix)
    if media_type is None or name not in _names():
        raise RouteNotFoundError(f"the page has no file {name!r}")
    return _answer(request, _read(name), media_type, {})


def _describe(state: ApiState) -> str:
    """What the page has to know of the server, as attributes."""
    settings = state.settings
    values = {
        "needs-key": state.keys.are_needed,
        "allows-roi-op": settings.allow_roi_op_override,
        "max-body-bytes": settings.max_body_bytes,
        "max-image-pixels": settings.max_image_pixels,
    }
    return " ".join(f'data-{name}="{str(value).lower()}"' for name, value in values.items())


def _answer(request: Request, content: bytes, media_type: str, headers: dict[str, str]) -> Response:
    """The content, or 304 if the browser has it already. Browsers ask each time, so that no release is mixed with
    another.
    """
    tag = f'W/"{hashlib.sha256(content).hexdigest()[:16]}"'  # weak: it may be compressed on its way
    headers = headers | {"ETag": tag, "Cache-Control": "no-cache"}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=media_type, headers=headers)


@cache
def _names() -> frozenset[str]:
    return frozenset(file.name for file in _FOLDER.iterdir()) - {"index.html"}


@cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()
