"""How a command speaks to its terminal, and how it ends: problems without a traceback, signals, JSON.

Belongs here: what all commands share. What each of them prints is its own.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from less_assets.errors import LessAssetsError

KEPT = "what is finished is kept, the same command goes on from there"


@contextmanager
def told(as_json: bool = False) -> Iterator[None]:
    """Print a user's problem without a traceback, as an event too if asked, and leave with status 1."""
    try:
        yield
    except LessAssetsError as error:
        if as_json:
            print_event("error", {"what": error.what, "where": error.where, "fix": error.fix})
        print(f"\nerror: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:  # of a disk or folder that nobody above has named better
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            raise typer.Exit(128 + signal.SIGPIPE) from None
        fix = f"check free space and permissions; {KEPT}"
        if as_json:
            print_event("error", {"what": str(error), "where": error.filename, "fix": fix})
        print(f"\nerror: {error}\n  to do: {fix}", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(f"\ninterrupted; {KEPT}", file=sys.stderr)
        raise typer.Exit(130) from None


def _nobody_reads() -> bool:
    """Whether standard output has no reader any more, as before `| head`; then the rest of it is dropped."""
    output = select.poll()
    output.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


@contextmanager
def termination_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM (of `kill`, Slurm, Kubernetes) end a run as Ctrl-C does: with closed records and a last word."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def as_json_text(data: Mapping[str, Any], indent: int | None = None, encoding: str | None = None) -> str:
    """An object as JSON, on one line without `indent`; what an encoding (UTF-8 by default) has not stands escaped."""
    text = json.dumps(data, ensure_ascii=False, indent=indent, allow_nan=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent, allow_nan=False)
    return text


def print_json(data: Mapping[str, Any]) -> None:
    """Print an object as JSON."""
    print(as_json_text(data, indent=1, encoding=sys.stdout.encoding), flush=True)


def print_event(kind: str, values: Mapping[str, Any], output: TextIO | None = None) -> None:
    """Print one event for programs, a line: `event`, `time` (seconds since the epoch), and its values.

    Args:
        kind: What has happened.
        values: What is known of it.
        output: Receives the line; None: standard output.
    """
    event = {"event": kind, "time": round(time.time(), 3), **values}
    print(as_json_text(event, encoding=(output or sys.stdout).encoding), file=output, flush=True)


def print_answer(answer: dict[str, Any], in_words: Callable[[dict[str, Any]], str], as_json: bool) -> None:
    """Print what was asked for, as JSON or in words."""
    print_json(answer) if as_json else print(in_words(answer))


def print_warning(line: str, as_json: bool) -> None:
    """Print a warning, or tell it as an event."""
    if as_json:
        print_event("message", {"level": "warning", "message": line})
    else:
        say(f"warning: {line}")


def say(line: str) -> None:
    """Print a line with the time to standard error."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", file=sys.stderr)
