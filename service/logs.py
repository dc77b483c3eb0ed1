"""Log lines: events with keys, as text or as JSON. Only entry points call `configure_logging`; every other room uses
`logging.getLogger(__name__)` and passes its keys as `extra={"fields": {...}}`. Each line that is written for a request
has its id.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Literal

import orjson

# Set for as long as a request lasts; asyncio copies it into the request's tasks.
request_id_context: ContextVar[str | None] = ContextVar("request_id", default=None)


# Longer texts are cut: a caller can send megabytes, and a message may repeat them.
_MAX_TEXT_LENGTH = 4096
# What uvicorn logs about its start and stop; we log ourselves when the server listens, is ready, drains and has
# stopped.
_UVICORNS_NEWS = re.compile(
    r"(Started|Finished) server process|Waiting for |Application (startup|shutdown) |Shutting down"
)


def configure_logging(*, log_format: Literal["text", "json"], log_level: str) -> None:
    """Send all log lines of this process to standard error.

    Args:
        log_format: `json` writes one object per line, `text` the same as `key=value`.
        log_level: least severity, `debug` to `error`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    level = logging.getLevelNamesMapping()[log_level.upper()]
    root = logging.getLogger()
    root.handlers = [handler]
    # Debug lines of this package only: libraries would log every chunk of every PNG.
    root.setLevel(max(level, logging.INFO))
    logging.getLogger("service").setLevel(level)
    logging.captureWarnings(True)  # as log lines, so that JSON stays JSON
    # It warns about every damaged form, which is the sender's mistake.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    logging.getLogger("uvicorn.error").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not _UVICORNS_NEWS.match(record.getMessage())


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time` (UTC), `level`, `logger`, `event`, `request_id`, then the event's own keys."""

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
        words += [f"{key}={_quoted(value)}" for key, value in (common | dict(_own_fields(record))).items()]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def _common_fields(record: logging.LogRecord) -> dict[str, object]:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    fields: dict[str, object] = {
        "time": f"{seconds}.{int(record.msecs):03d}Z",
        "level": record.levelname.lower(),
        # uvicorn logs everything but requests to this logger, whose name looks like trouble.
        "logger": "uvicorn" if record.name == "uvicorn.error" else record.name,
        "event": _one_line(record.getMessage()),
    }
    if request_id := request_id_context.get():
        fields["request_id"] = request_id
    return fields


def _own_fields(record: logging.LogRecord) -> Mapping[str, object]:
    fields: Mapping[str, object] = getattr(record, "fields", {})
    return {key: _one_line(value) if isinstance(value, str) else value for key, value in fields.items()}


def _one_line(text: str) -> str:
    """The text in a form that is safe for any log: cut if very long, without line breaks, and valid Unicode."""
    if len(text) > _MAX_TEXT_LENGTH:
        text = f"{text[:_MAX_TEXT_LENGTH]}… ({len(text)} characters)"
    text = re.sub(r"\s*\n\s*", "; ", text.strip())
    # This also escapes control sequences, which a terminal would obey, and lone surrogates, which no encoder accepts.
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _quoted(value: object) -> str:
    """Quote a value that would break the line's format, so that a caller cannot forge log fields."""
    text = str(value)
    return text if text.isprintable() and " " not in text and '"' not in text else orjson.dumps(text).decode()
