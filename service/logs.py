"""Log lines: events with keys, as text or as JSON. `configure_logging` is called by the entry points only; every other
room uses `logging.getLogger(__name__)` and passes its keys as `extra={"fields": {...}}`. The id of the request that is
being answered stands on every line that is written for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal

import orjson

# Bound by the outermost layer of the HTTP app for as long as a request lasts; copied into its tasks by asyncio.
request_id_context: ContextVar[str | None] = ContextVar("request_id", default=None)


def configure_logging(*, log_format: Literal["text", "json"], log_level: str) -> None:
    """Send all log lines of this process to standard error.

    Args:
        log_format: `json` writes one object a line, `text` the same as `key=value`.
        log_level: least severity, `debug` to `error`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    level = logging.getLevelNamesMapping()[log_level.upper()]
    root = logging.getLogger()
    root.handlers = [handler]
    # Debugging is about this package, not about every chunk of every PNG.
    root.setLevel(max(level, logging.INFO))
    logging.getLogger("service").setLevel(level)
    # It warns of every damaged form, which is its sender's business.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (UTC), `level`, `logger`, `event`, `request_id`, then the event's own keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = _common_fields(record) | dict(_own_fields(record))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextFormatter(logging.Formatter):
    """`time level logger event key=value ...`; a traceback, where there is one, follows on its own lines."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        common = _common_fields(record)
        words = [str(common.pop(name)) for name in ("time", "level", "logger", "event")]
        words += [f"{key}={_text_value(value)}" for key, value in (common | dict(_own_fields(record))).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _common_fields(record: logging.LogRecord) -> dict[str, object]:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, object] = {
        "time": f"{seconds}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        "logger": record.name,
        "event": record.getMessage(),
    }
    if request_id := request_id_context.get():
        fields["request_id"] = request_id
    return fields


def _own_fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return fields


def _text_value(value: object) -> str:
    """Quote what would break the line apart, so that a caller cannot write log lines of their own."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else orjson.dumps(text).decode()
