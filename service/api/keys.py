"""The API keys of a running server: those of the settings, and those of key files, which can be reloaded while it
serves. Keys are bytes here, since that is what an HTTP header holds.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Iterable
from pathlib import Path

from pydantic import SecretStr
from pydantic_core import PydanticCustomError

from service.errors import ServiceError
from service.settings import Settings, check_key

logger = logging.getLogger(__name__)

# Enough for tens of thousands of keys; a larger file, or an endless device, is a mistake.
_MAX_FILE_BYTES = 1024 * 1024


class Keys:
    """Who may call what.

    * Users' keys (`api_keys`, `api_keys_file`) open `/v1`. Without any, everyone may call it.
    * Administrators' keys (`admin_keys`, `admin_keys_file`) open all of `/v1`, loading and unloading included. Without
      any, loading and unloading are off. They do not close `/v1` to others.

    Args:
        settings: the key files are read at once.

    Raises:
        ServiceError: a key file cannot be read, or holds no key.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._read()

    def _read(self) -> None:
        settings = self._settings
        users = _encoded(settings.api_keys) | _keys_in(settings.api_keys_file)
        self._administrators = _encoded(settings.admin_keys) | _keys_in(settings.admin_keys_file)
        self._users = users

    def reload(self) -> None:
        """Reread the key files. If one of them cannot be used, all keys stay as they were and the log says why."""
        try:
            self._read()
        except ServiceError as error:
            logger.error("the keys stay as they were", extra={"fields": {"reason": str(error)}})
        else:
            self.tell()

    def tell(self) -> None:
        """Log who may call what, without the keys."""
        fields = {
            "v1": "with a key" if self.are_needed else "open to everyone",
            "load_and_unload": "with an administrator's key" if self.has_administrators else "off",
            "users": len(self._users),
            "administrators": len(self._administrators),
        }
        logger.info("API keys", extra={"fields": fields})

    @property
    def have_files(self) -> bool:
        """Whether there are key files to reload."""
        return (self._settings.api_keys_file or self._settings.admin_keys_file) is not None

    @property
    def are_needed(self) -> bool:
        """Whether `/v1` requires a key."""
        return bool(self._users)

    @property
    def has_administrators(self) -> bool:
        """Whether there is any key that may load and unload models."""
        return bool(self._administrators)

    def is_known(self, key: bytes) -> bool:
        """Whether this is a key of a user or of an administrator."""
        # Always check both, so that the time does not reveal which of them a key belongs to.
        return sum((_is_one_of(key, self._users), _is_one_of(key, self._administrators))) > 0

    def is_administrators(self, key: bytes) -> bool:
        """Whether this is an administrator's key."""
        return _is_one_of(key, self._administrators)


def _is_one_of(key: bytes, allowed: Iterable[bytes]) -> bool:
    # Compare with every key, each in constant time, so that the time does not reveal how close a guess was.
    return sum(hmac.compare_digest(key, one) for one in allowed) > 0


def _encoded(keys: Iterable[SecretStr]) -> frozenset[bytes]:
    return frozenset(key.get_secret_value().encode() for key in keys)


def _keys_in(file: Path | None) -> frozenset[bytes]:
    """The keys of a file, one per line; surrounding blanks and empty lines are ignored."""
    if file is None:
        return frozenset()
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ServiceError(f"key file {file}: cannot be read: {error.strerror}") from error
    if len(data) > _MAX_FILE_BYTES:
        raise ServiceError(f"key file {file}: expected at most {_MAX_FILE_BYTES} bytes of keys, one a line")
    # Bytes that are not UTF-8 become surrogates, which `check_key` refuses, as in an environment variable.
    keys = [line.strip() for line in data.decode(errors="surrogateescape").splitlines() if line.strip()]
    if not keys:
        raise ServiceError(f"key file {file}: expected a key on each line, got none")
    try:
        for key in keys:
            check_key(key)
    except PydanticCustomError as error:
        raise ServiceError(f"key file {file}: {error.message()}") from None
    return frozenset(key.encode() for key in keys)
