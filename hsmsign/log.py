"""The service's log: one line for each request, as JSON or for a console, on standard error.

A line holds no body, no field of a form but the machine or distro, and no secret. Tracebacks show no values.
"""

import logging
import sys
import time
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any

import structlog

from hsmsign.settings import LogSettings

logger = structlog.stdlib.get_logger("hsmsign")

_fields: ContextVar[dict[str, object] | None] = ContextVar("fields", default=None)


def configure(settings: LogSettings) -> None:
    """Sends this log, and the warnings of every library, to standard error in the form that is asked for."""
    renderer: structlog.typing.Processor
    as_json = settings.format == "json" or (settings.format is None and not sys.stderr.isatty())
    if as_json:
        renderer = structlog.processors.JSONRenderer()
    else:
        # rich's tracebacks would print the values of variables
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    shared: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if as_json:
        shared.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(settings.level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[_name_library, structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("signers").setLevel(settings.level.upper())


def _name_library(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    event["library"] = event["_record"].name
    if (line := _fields.get()) is not None and "request_id" in line:
        event["request_id"] = line["request_id"]
    return event


def begin(**fields: object) -> "RequestLine":
    """Starts the line of a request; what `note` adds in this task and in those that it starts belongs to it."""
    line = RequestLine(fields)
    _fields.set(line.fields)
    return line


def note(**fields: object) -> None:
    """Adds fields to the line of the request that the current task works for, if it does."""
    line = _fields.get()
    if line is not None:
        line.update(fields)


class RequestLine:
    """The one line of a request; `fields` grow until it is written."""

    def __init__(self, fields: dict[str, object]) -> None:
        self.fields = fields
        self._started = time.monotonic()

    def write(self, status: int | None, received: int, sent: int) -> None:
        """Writes the line; a request without a `status` is one whose client left before its answer."""
        log = logger.error if status is not None and status >= 500 else logger.info
        log(
            "request",
            **self.fields,
            status=status,
            received_bytes=received,
            sent_bytes=sent,
            duration_ms=round((time.monotonic() - self._started) * 1000, 1),
        )
