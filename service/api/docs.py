"""Serves Swagger UI, on which people can try the service, from files of an installed package: it works offline."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse

from service.api.errors import RouteNotFoundError

router = APIRouter(include_in_schema=False)

# fastapi-offline is only a carrier: it ships the assets that FastAPI itself would fetch from a CDN.
_ASSETS = files("fastapi_offline") / "static"
_INLINE_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}


def page_headers(*policies: str) -> dict[str, str]:
    """Headers of a page that loads nothing from other servers, and that no other page may frame.

    Args:
        policies: what it needs beyond images and requests to this server, as directives of a content security policy.
    """
    own = ("default-src 'none'", "img-src 'self' data: blob:", "connect-src 'self'", "form-action 'self'")
    policy = "; ".join((*own, "base-uri 'none'", "frame-ancestors 'none'", *policies))
    return {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The description that the page shows. Our own route, so that it has a label of its own in the metrics."""
    root = request.scope.get("root_path", "")
    servers = {"servers": [{"url": root}]} if root else {}
    return JSONResponse(request.app.openapi() | servers)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The page."""
    root = request.scope.get("root_path", "")
    page = get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url=f"{root}/docs/favicon.png",
        # Otherwise Swagger UI asks a validator on the internet about every document.
        swagger_ui_parameters={"validatorUrl": None, "tryItOutEnabled": True},
    )
    # Only the page's own inline script is allowed, by its hash; an injected one is not.
    hashes = [hashlib.sha256(script).digest() for script in _INLINE_SCRIPT.findall(bytes(page.body))]
    scripts = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)
    page.headers.update(page_headers(f"script-src 'self' {scripts}", "style-src 'self' 'unsafe-inline'"))
    return page


@router.get("/docs/{asset}")
async def docs_asset(asset: str) -> Response:
    """One file of the page."""
    if asset not in _MEDIA_TYPES:
        raise RouteNotFoundError(f"the page has no file {asset!r}")
    return Response((_ASSETS / asset).read_bytes(), media_type=_MEDIA_TYPES[asset])
