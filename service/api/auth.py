"""API keys: who may call what. Routes name the dependency that they need; without configured keys everybody may."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from typing import Annotated

from fastapi import Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr

from service.api.errors import KeyNotAllowedError, MissingKeyError
from service.api.state import State

_Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]
_HOW_TO_SEND = "send a key as `Authorization: Bearer KEY` or as `X-API-Key: KEY`"
_Header = Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))]


async def require_key(state: State, bearer: _Bearer, header: _Header) -> None:
    """Let only bearers of a user's or an administrator's key pass, if any key is configured.

    Raises:
        MissingKeyError: no key came, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.
        KeyNotAllowedError: it is not one of ours.
    """
    keys = [*state.settings.api_keys, *state.settings.admin_keys]
    if not keys:
        return
    key = bearer.credentials if bearer else header
    if key is None:
        raise MissingKeyError(_HOW_TO_SEND)
    if not _is_one_of(key, keys):
        raise KeyNotAllowedError("the key that was sent may not do this")


async def require_admin_key(state: State, bearer: _Bearer, header: _Header) -> None:
    """Let only bearers of an administrator's key pass.

    Raises:
        MissingKeyError: no key came.
        KeyNotAllowedError: it is not an administrator's, or there is no such key.
    """
    if not state.settings.admin_keys:
        raise KeyNotAllowedError("this server has no keys of administrators; start it with ROISERVE_ADMIN_KEYS=KEY")
    key = bearer.credentials if bearer else header
    if key is None:
        raise MissingKeyError(_HOW_TO_SEND)
    if not _is_one_of(key, state.settings.admin_keys):
        raise KeyNotAllowedError("this needs the key of an administrator")


def _is_one_of(key: str, allowed: Iterable[SecretStr]) -> bool:
    # All are compared, each in constant time, so that the time says nothing of how near a guess was.
    given = key.encode()
    return sum(hmac.compare_digest(given, one.get_secret_value().encode()) for one in allowed) > 0
