"""The routes that list and describe the loaded models, and let an administrator load and unload them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Query, Response
from pydantic import BeforeValidator

from service.api.auth import require_admin_key, require_key
from service.api.openapi import describe_answer, describe_errors
from service.api.options import only_options, refuse_underscores
from service.api.schemas import ModelDescription, ModelList, json_response, model_document
from service.api.state import State

router = APIRouter(
    prefix="/v1/models",
    tags=["models"],
    dependencies=[Depends(require_key)],
    responses=describe_errors(401, 403, 503),
)

Name = Annotated[str, Path(description="name, or name@version", examples=["nuclei"])]


@router.get("", responses=describe_answer(ModelList))
async def list_models(state: State) -> Response:
    """All loaded models."""
    state.lifecycle.require_serving()
    default = state.models.find(None)
    return json_response({"models": [model_document(one, is_default=one is default) for one in state.models]})


@router.get("/{name}", responses=describe_answer(ModelDescription) | describe_errors(404, 422))
async def show_model(name: Name, state: State) -> Response:
    """One loaded model, by name or name@version."""
    state.lifecycle.require_serving()
    info = state.models.find(name)
    return json_response(model_document(info, is_default=info is state.models.find(None)))


@router.post(
    "/{name}/load",
    dependencies=[Depends(require_admin_key), Depends(only_options("version"))],
    responses=describe_answer(ModelDescription) | describe_errors(404, 409, 422, 429),
)
async def load_model(
    name: Name,
    state: State,
    version: Annotated[
        int | None,
        BeforeValidator(refuse_underscores),
        Query(ge=1, le=10**9, description="Unset, the one that the file `default` says, else the highest."),
    ] = None,
) -> Response:
    """Load a model of the store, by name or name@version, beside those that serve, and let it replace the loaded model
    of the same name.

    Requests that arrived earlier are still answered by the old model; then it is unloaded, and this request is
    answered. If the new model cannot be loaded, the old one goes on serving.
    """
    state.lifecycle.require_serving()
    info = await state.load_model(name if version is None else f"{name}@{version}")
    return json_response(model_document(info, is_default=info is state.models.find(None)))


@router.post(
    "/{name}/unload",
    dependencies=[Depends(require_admin_key), Depends(only_options())],
    status_code=204,
    responses=describe_errors(404, 409, 422),
)
async def unload_model(name: Name, state: State) -> Response:
    """Unload a model, by name or name@version, once all earlier requests for it have been answered."""
    state.lifecycle.require_serving()
    await state.unload_model(name)
    return Response(status_code=204)
