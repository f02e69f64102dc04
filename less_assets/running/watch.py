"""What is seen of a run while it goes on: one live block in a terminal, or one JSON event a line.

Belongs here: turning the runner's events and the lines of steps into either. Plain lines, for a pipe, need nothing of
this: they are the log itself.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from less_assets.compute.progress import duration
from less_assets.running.terminal import print_event

SHOWN_READY = 4
"""Finished assets that the block names, the last one first."""


class JsonEvents:
    """One JSON object a line: `event`, `time` (seconds since the epoch), and the event's values.

    Args:
        output: Receives the lines.
    """

    def __init__(self, output: TextIO) -> None:
        self._output = output

    def tell(self, kind: str, values: Mapping[str, Any]) -> None:
        """Write an event."""
        print_event(kind, values, self._output)

    def log(self, line: str) -> None:
        """Write a line of the runner as an event."""
        self.tell("message", {"level": "info", "message": line})

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hear what steps say, for as long as the block lasts."""
        from less_assets.orchestration.console_log import heard_by  # it loads Dagster

        with heard_by(self._hear):
            yield

    def _hear(self, entry: Mapping[str, Any]) -> None:
        values = {name: value for name, value in entry.items() if name != "time"}
        self.tell("progress" if "done" in entry else "message", values)


class LiveBlock:
    """One block at the foot of a terminal: stage, asset, bar, time left in total, and what is ready.

    Warnings and the paths of subsets are printed above it, and stay.

    Args:
        console: The terminal.
        planned: Seconds that the plan expects of each asset, as far as it knows.
    """

    def __init__(self, console: Console, planned: Mapping[str, float]) -> None:
        self._console, self._left = console, dict(planned)
        self._head = self._said = ""
        self._asset: str | None = None
        self._started = 0.0
        self._partitions, self._made = 0, 0
        self._figures: Mapping[str, Any] = {}
        self._ready: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Show the block and hear what steps say, for as long as the block lasts; then it vanishes."""
        from less_assets.orchestration.console_log import heard_by

        live = Live(console=self._console, get_renderable=self.shown, refresh_per_second=4, transient=True)
        with live, heard_by(self._hear):
            yield

    def log(self, line: str) -> None:
        """Show a line of the runner until the next one comes."""
        self._said = line

    def tell(self, kind: str, values: Mapping[str, Any]) -> None:
        """Take in an event of the runner."""
        if kind == "asset_started":
            self._head = f"stage {values['stage']} of {values['stages']}  {values['asset']}"
            self._asset, self._started = values["asset"], time.monotonic()
            self._partitions, self._made, self._figures, self._said = values["partitions"], 0, {}, ""
        elif kind == "made" and values["asset"] == self._asset:
            self._made += len(values["partitions"]) or 1
        elif kind == "asset_finished":
            self._left.pop(values["asset"], None)
            self._ready.append(values["asset"])
        elif kind == "subset":
            line = f"rows of {values['recipe']} for {values['task']}: {values['path']}"
            self._console.print(Text(line), soft_wrap=True)
            self._said = ""

    def _hear(self, entry: Mapping[str, Any]) -> None:
        if entry["level"] != "info":
            self._console.print(Text(f"{entry['level']}: {entry['message']}"), soft_wrap=True)
        elif "done" in entry:
            self._figures = entry
        else:
            self._said = entry["message"]

    def shown(self) -> Group:
        """The block as it stands now."""
        figures = self._figures
        done, total, unit = figures.get("done"), figures.get("total"), figures.get("unit", "")
        if done is None or total is None:
            done, total, unit = self._made, self._partitions, "made"
        line = Table.grid(padding=(0, 2))
        words = [str(figures.get("partition", "")), f"{done:,} of {total:,} {unit}"]
        if "seconds_left" in figures:
            words.append(f"{duration(figures['seconds_left'])} left of it")
        line.add_row(
            ProgressBar(total=max(1, total), completed=done, width=30), *(Text(word) for word in words if word)
        )
        ready = ", ".join(self._ready[: -SHOWN_READY - 1 : -1])
        more = f" and {len(self._ready) - SHOWN_READY} more" if len(self._ready) > SHOWN_READY else ""
        return Group(
            Text(self._head, style="bold", no_wrap=True, overflow="ellipsis"),
            line,
            Text(self._time_left(), no_wrap=True),
            Text(f"ready: {ready}{more}" if ready else "", no_wrap=True, overflow="ellipsis"),
            Text(self._said, style="dim", no_wrap=True, overflow="ellipsis"),
        )

    def _time_left(self) -> str:
        """Planned time of all that is not finished, less what the current asset has taken."""
        if not self._left:
            return ""
        current = self._left.get(self._asset or "", 0.0)
        elapsed = time.monotonic() - self._started if self._asset else 0.0
        left = sum(self._left.values()) - min(current, elapsed)
        return f"about {duration(left)} left in total, as far as speeds are known"
