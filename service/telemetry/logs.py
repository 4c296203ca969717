"""Writes the service's log to standard error, one line per record, in ``logging.format``."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog

from betrace.service.config.edge import Logging
from betrace.service.telemetry.events import EventFields

_SHOWN_FIRST = ("time", "level", "logger", "event", "message")


def set_up_logging(settings: Logging) -> None:
    """Send the service's log to standard error, as configured. Times are UTC."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_formatter(settings.format))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    for name in ("service", "channels"):
        logging.getLogger(name).setLevel(settings.level.upper())
    # Hypercorn logs its addresses, which the service logs itself.
    logging.getLogger("service.http.hypercorn").setLevel(logging.WARNING)


def _formatter(form: str) -> logging.Formatter:
    if form == "text":
        text = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s")
        text.datefmt = "%Y-%m-%dT%H:%M:%S"
        text.converter = time.gmtime
        return text
    render: Any = structlog.processors.JSONRenderer(serializer=_json)
    if form == "logfmt":
        render = structlog.processors.LogfmtRenderer(key_order=_SHOWN_FIRST, drop_missing=True)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[_describe],
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            render,
        ],
    )


def _describe(_: Any, __: str, given: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The fields of a log record, and those of its event if it has one."""
    record: logging.LogRecord = given["_record"]
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    message = given.pop("event")
    given["time"] = f"{moment}.{int(record.msecs):03d}Z"
    given["level"] = record.levelname.lower()
    given["logger"] = record.name
    event = getattr(record, "event", None)
    if isinstance(event, EventFields):
        given["event"] = event.name
    given["message"] = message
    if isinstance(event, EventFields):
        given.update(event.fields)
    return given


def _json(value: Any, **options: Any) -> str:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()
