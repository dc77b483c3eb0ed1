"""Which models can be asked, and what they are."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Response

from service.api.auth import require_key
from service.api.openapi import describe_answer, describe_errors
from service.api.schemas import ModelDescription, ModelList, json_response, model_document
from service.api.state import State

router = APIRouter(
    prefix="/v1/models",
    tags=["models"],
    dependencies=[Depends(require_key)],
    responses=describe_errors(401, 403, 503),
)


@router.get("", responses=describe_answer(ModelList))
async def list_models(state: State) -> Response:
    """All loaded models."""
    state.lifecycle.require_serving()
    default = state.models.find(None)
    return json_response({"models": [model_document(one, is_default=one is default) for one in state.models]})


@router.get("/{name}", responses=describe_answer(ModelDescription) | describe_errors(404, 422))
async def show_model(name: str, state: State) -> Response:
    """One loaded model, by name or name@version."""
    state.lifecycle.require_serving()
    info = state.models.find(name)
    return json_response(model_document(info, is_default=info is state.models.find(None)))
