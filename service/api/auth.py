"""Who may call what, as FastAPI dependencies: each route declares the one it needs. `keys.py` holds the keys."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyHeader, APIKeyQuery, HTTPAuthorizationCredentials, HTTPBearer

from service.api.errors import KeyNotAllowedError, MissingKeyError
from service.api.middleware import Record
from service.api.quotas import fingerprint
from service.api.state import State

Bearer = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]
KeyHeader = Annotated[str | None, Security(APIKeyHeader(name="X-API-Key", auto_error=False))]
KeyQuery = Annotated[str | None, Security(APIKeyQuery(name="api_key", auto_error=False))]
_HOW_TO_SEND = "send a key as `Authorization: Bearer KEY`, as `X-API-Key: KEY`, or as the password of a Basic login"
_UNKNOWN = "unknown key: this server does not know the key that was sent"


async def _password(request: Request) -> bytes | None:
    """The password of `Authorization: Basic`, which is all that some clients can send; the user does not matter."""
    scheme, _, login = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(login.strip(), validate=True).partition(b":")[2] or None
    except (binascii.Error, ValueError):
        return None


Password = Annotated[bytes | None, Depends(_password)]


async def require_key(state: State, record: Record, bearer: Bearer, header: KeyHeader, password: Password) -> None:
    """Let a request pass if it has a user's or an administrator's key, or if `/v1` needs no key.

    Raises:
        MissingKeyError: no key was sent: as `Authorization: Bearer KEY`, as `X-API-Key: KEY` or as a password.
        KeyNotAllowedError: it is not one of ours.
    """
    if not state.keys.are_needed:
        return
    key = _sent(bearer, header, password)
    if not state.keys.is_known(key):
        raise KeyNotAllowedError(_UNKNOWN)
    record.notes["key"] = record.caller = fingerprint(key)


async def require_key_or_query(
    state: State, record: Record, bearer: Bearer, header: KeyHeader, password: Password, query: KeyQuery
) -> None:
    """Like `require_key`, for a protocol whose clients may also send the key in the query, as `api_key`."""
    if state.keys.are_needed and (bearer or header or password or query) is None:
        raise MissingKeyError(
            f"{_HOW_TO_SEND}; inference_sdk does with InferenceConfiguration(api_key_transport='header')"
        )
    await require_key(state, record, bearer, header or query, password)


async def require_admin_key(state: State, bearer: Bearer, header: KeyHeader, password: Password) -> None:
    """Let a request pass if it has an administrator's key.

    Raises:
        MissingKeyError: no key was sent.
        KeyNotAllowedError: it is a user's key, or unknown, or this server has no administrators' keys.
    """
    if not state.keys.has_administrators:
        raise KeyNotAllowedError(
            "no administrator's key is set, so nobody can load or unload models over HTTP; "
            "start the server with ROISERVE_ADMIN_KEYS or ROISERVE_ADMIN_KEYS_FILE"
        )
    key = _sent(bearer, header, password)
    if not state.keys.is_administrators(key):
        is_users = state.keys.is_known(key)
        raise KeyNotAllowedError(
            "this key may detect, but not load or unload models: that needs an administrator's key"
            if is_users
            else _UNKNOWN
        )


async def require_admin_key_or_query(
    state: State, bearer: Bearer, header: KeyHeader, password: Password, query: KeyQuery
) -> None:
    """Like `require_admin_key`, for a protocol whose clients may also send the key in the query, as `api_key`."""
    await require_admin_key(state, bearer, header or query, password)


def _sent(bearer: HTTPAuthorizationCredentials | None, header: str | None, password: bytes | None) -> bytes:
    key = bearer.credentials if bearer else header
    if key is None and password is not None:
        return password
    if key is None:
        raise MissingKeyError(_HOW_TO_SEND)
    # Starlette decodes headers as Latin-1, whatever the client meant: this restores the bytes that were sent.
    # Other characters can only come from a query, and no key has them.
    return key.encode("latin-1", errors="replace")
