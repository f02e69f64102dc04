"""How log lines look in a terminal.

Belongs here: one Dagster logger that prints what a person wants to read. Dagster's own event log keeps everything.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from less_assets.compute.progress import FIGURES

FORMAT_VARIABLE = "LESS_ASSETS_LOG"
"""Set to `json`, it makes every line one JSON object: time, level, run, asset, message; figures of progress."""


_listeners: list[Callable[[Mapping[str, Any]], object]] = []


def _meta(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "dagster_meta", {}) or {}


def _message(record: logging.LogRecord) -> str:
    return _meta(record).get("orig_message") or record.getMessage()


def _is_wanted(record: logging.LogRecord) -> bool:
    """Whether a line tells something: Dagster skips the checks that a run of several partitions makes itself."""
    return not _message(record).startswith("Skipping step ")


def _entry(record: logging.LogRecord) -> dict[str, Any]:
    """A line for programs: time, level, run, asset, message, and the figures of progress."""
    meta = _meta(record)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(record.created)),
        "level": record.levelname.lower(),
        "run": meta.get("run_id"),
        "asset": meta.get("step_key"),
        "message": _message(record),
        **FIGURES.get(),
    }
    return {key: value for key, value in entry.items() if value is not None}


class _Message(logging.Formatter):
    """Time and message; the message alone says which asset and partition it is about."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, '%H:%M:%S')}  {level}{_message(record)}"


class _Json(logging.Formatter):
    """One JSON object a line, for programs that collect logs."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_entry(record), ensure_ascii=False)


class _Console(logging.StreamHandler):
    """Standard error, or whoever listens instead."""

    def emit(self, record: logging.LogRecord) -> None:
        if _listeners:
            _listeners[-1](_entry(record))
        else:
            super().emit(record)


@contextmanager
def heard_by(listener: Callable[[Mapping[str, Any]], object]) -> Iterator[None]:
    """Give every line of this process to a function, as LESS_ASSETS_LOG=json has it, instead of printing it."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@dg.logger(
    {"log_level": dg.Field(str, default_value="INFO", is_required=False, description="Lowest level that is printed.")},
    description="One short line for each message, on standard error; JSON if LESS_ASSETS_LOG is json.",
)
def compact_console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Dagster's console logger of this project."""
    logger = logging.Logger("less_assets", level=init_context.logger_config["log_level"])
    handler = _Console(sys.stderr)
    handler.setFormatter(_Json() if os.environ.get(FORMAT_VARIABLE) == "json" else _Message())
    handler.addFilter(_is_wanted)
    logger.addHandler(handler)
    return logger
