"""The page on which to try the service, Swagger UI, from files of an installed package: it works without internet."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse

from service.api.errors import RouteNotFoundError

router = APIRouter(include_in_schema=False)

# fastapi-offline is only a carrier: it ships the assets that FastAPI itself would fetch from a CDN.
_ASSETS = files("fastapi_offline") / "static"
_MEDIA_TYPES = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon.png": "image/png",
}


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """The description that the page shows. A route of ours, so that the metrics know it by its name."""
    return JSONResponse(request.app.openapi())


@router.get("/docs")
async def docs(request: Request) -> Response:
    """The page."""
    root = request.scope.get("root_path", "")
    return get_swagger_ui_html(
        openapi_url=f"{root}/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{root}/docs/swagger-ui-bundle.js",
        swagger_css_url=f"{root}/docs/swagger-ui.css",
        swagger_favicon_url=f"{root}/docs/favicon.png",
        # Otherwise Swagger UI asks a validator on the internet about every document.
        swagger_ui_parameters={"validatorUrl": None},
    )


@router.get("/docs/{asset}")
async def docs_asset(asset: str) -> Response:
    """One file of the page."""
    if asset not in _MEDIA_TYPES:
        raise RouteNotFoundError(f"the page has no file {asset!r}")
    return Response((_ASSETS / asset).read_bytes(), media_type=_MEDIA_TYPES[asset])
