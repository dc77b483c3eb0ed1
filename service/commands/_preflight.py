"""Finds, within milliseconds, what would keep the server from starting: an address that it cannot listen on, or a store
without the models that it is to serve. Does not import torch, which takes seconds.
"""

from __future__ import annotations

import errno
import socket

from service.errors import ModelNotFoundError, ServiceError
from service.model_store.store import ModelStore
from service.settings import Settings

_HOW_TO_FILL = (
    "`roiserve models pull maskrcnn_resnet50_fpn_v2` downloads one, `roiserve models import FILE --name NAME` takes "
    "one of yours"
)


def check_address(host: str, port: int, *, flag: str = "--port") -> None:
    """Check that the server can listen on an address, by doing so for a moment.

    Args:
        flag: the flag that chooses the port, for messages.

    Raises:
        ServiceError: it cannot; says why and what to change.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise ServiceError(f"cannot listen: --host {host!r} is no address or name of this machine ({error})") from None
    family, kind, protocol, _, address = addresses[0]
    try:
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        raise ServiceError(f"cannot listen: {_why(error, host, port, flag)}") from None


def _why(error: OSError, host: str, port: int, flag: str) -> str:
    if error.errno == errno.EADDRINUSE:
        any_port = ", or --port 0 for any" if flag == "--port" else ""
        return f"port {port} on {host} is in use by another program; choose another with {flag}{any_port}"
    if error.errno == errno.EACCES:
        return f"this user may not listen on port {port} (below 1024 it takes privileges); choose another with {flag}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"this machine has no address {host}; --host 0.0.0.0 listens on all that it has"
    return f"--host {host} {flag} {port}: {error.strerror}"


def check_models(settings: Settings) -> None:
    """Check that the models to serve exist, by looking at their folders only.

    Raises:
        ModelStoreError: the store is missing or cannot be read.
        ModelNotFoundError: the store is empty, or lacks a model that the settings name.
    """
    store = ModelStore(settings.model_store)
    stored = [store.find(reference) for reference in settings.models] or store.list()
    if not stored:
        raise ModelNotFoundError(f"there is no model in {store.root.absolute()}; {_HOW_TO_FILL}")
    names = {name for model in stored for name in (model.name, model.key)}
    if settings.default_model is not None and settings.default_model not in names:
        known = ", ".join(model.key for model in stored)
        raise ModelNotFoundError(f"the default model {settings.default_model!r} is not among {known}")
