"""How log lines look in a terminal.

Belongs here: one Dagster logger that prints what a person wants to read. Dagster's own event log keeps everything.
"""

import logging
import sys

import dagster as dg


class _Message(logging.Formatter):
    """Time and message; the message alone says which asset and partition it is about."""

    def format(self, record: logging.LogRecord) -> str:
        meta = getattr(record, "dagster_meta", {}) or {}
        message = meta.get("orig_message") or record.getMessage()
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, '%H:%M:%S')}  {level}{message}"


@dg.logger(
    {"log_level": dg.Field(str, default_value="INFO", is_required=False, description="Lowest level that is printed.")},
    description="One short line for each message, on standard error.",
)
def compact_console(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Dagster's console logger of this project."""
    logger = logging.Logger("less_assets", level=init_context.logger_config["log_level"])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Message())
    logger.addHandler(handler)
    return logger
