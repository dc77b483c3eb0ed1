"""The route `/`: a small page for people, and the addresses in JSON for programs."""

from __future__ import annotations

from html import escape

from fastapi import APIRouter, Request, Response

from service.api.docs import page_headers
from service.api.schemas import json_response
from service.api.state import ApiState

router = APIRouter(include_in_schema=False)

_LINKS = {
    "docs": ("/docs", "every route, to read and to try"),
    "models": ("/v1/models", "the loaded models"),
    "openapi": ("/openapi.json", "the description of the API for programs"),
    "ready": ("/readyz", "whether the models are loaded"),
    "metrics": ("/metrics", "figures for Prometheus"),
}
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>RoIServe</title>
<link rel="icon" href="{root}/docs/favicon.png">
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }}
form {{ border: 1px solid #bbb; border-radius: .5rem; padding: 1rem }}
label, button {{ display: block; margin: .5rem 0 }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: .5rem }}
</style>
</head>
<body>
<h1>RoIServe {version}</h1>
<p>Images in; boxes, labels, scores and masks out.</p>
<form method="post" action="{root}/v1/annotate" enctype="multipart/form-data">
<label>Image <input type="file" name="image" accept="image/*" required></label>
<label>Least score, 0 to 1 <input name="score_thresh" inputmode="decimal" placeholder="the model's"></label>
<button>Draw what is found</button>
{note}</form>
<p>From a terminal:</p>
<pre>curl -F image=@photo.jpg {url}/v1/detect</pre>
<ul>
{links}
</ul>
</body>
</html>
"""


@router.get("/")
async def start(request: Request) -> Response:
    """A page if the caller is a browser, else JSON."""
    root = request.scope.get("root_path", "")
    version = request.app.version
    state: ApiState = request.app.state.api
    links = dict(_LINKS)
    if state.settings.admin_port is not None:
        del links["ready"], links["metrics"]  # those are on the admin port
    if "text/html" not in request.headers.get("accept", ""):
        paths = {name: f"{root}{path}" for name, (path, _) in links.items()}
        return json_response({"name": "RoIServe", "version": version, "detect": f"{root}/v1/detect", **paths})
    page = _PAGE.format(
        root=escape(root),
        version=escape(version),
        url=escape(f"{request.url.scheme}://{request.url.netloc}{root}"),
        note="<p>This server wants an API key, which a form cannot send: use /docs.</p>\n"
        if state.keys.are_needed
        else "",
        links="\n".join(f'<li><a href="{escape(root)}{path}">{path}</a>: {what}</li>' for path, what in links.values()),
    )
    return Response(page, media_type="text/html", headers=page_headers("style-src 'unsafe-inline'"))
