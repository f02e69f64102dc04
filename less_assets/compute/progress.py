"""Progress with an estimate of what is left, for everything that takes longer than a few seconds.

Belongs here: counting and wording, and reading the wording back for programs. Where the lines go (Dagster's log, a
terminal) is the caller's choice.
"""

import re
import time
from collections.abc import Callable
from typing import Any

INTERVAL_SECONDS = 5.0
_LINE = re.compile(
    r"(?P<asset>\S+)(?: (?P<partition>\S+))?: (?P<done>[\d,]+) of (?P<total>[\d,]+) (?P<unit>.+?) \(\d+ %\), "
    r"(?P<per_second>[\d,.]+) (?P=unit)/s, (?:(?P<tokens_per_second>[\d,]+) tokens/s, )?(?P<left>.+) left"
)


class Progress:
    """Counts units of work and says every few seconds how far it is and how long the rest will take.

    Args:
        what: What is being done, e.g. `train_gradients epoch-1`.
        total: Units in all.
        unit: Name of a unit, plural, e.g. `rows`.
        log: Receives one line at a time.
        done: Units that an earlier, interrupted run had finished; they do not count for the rate.
    """

    def __init__(self, what: str, total: int, unit: str, log: Callable[[str], object], done: int = 0) -> None:
        self.what, self.total, self.unit, self._log = what, total, unit, log
        self.done = self._done_before = done
        self._tokens = 0
        self.started = self._last = time.monotonic()
        if done:
            self._log(f"{what}: {done:,} of {total:,} {unit} were done before, going on from there")

    def __call__(self, units: int, tokens: int = 0) -> None:
        """Count `units` more units as done, and the tokens that went through a model for them."""
        self.done += units
        self._tokens += tokens
        now = time.monotonic()
        if now - self._last >= INTERVAL_SECONDS and self.done < self.total:
            self._last = now
            rate = (self.done - self._done_before) / (now - self.started)
            left = (self.total - self.done) / rate if rate > 0 else float("inf")
            share = 100 * self.done / self.total
            self._log(
                f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({share:.0f} %), "
                f"{rate:,.1f} {self.unit}/s, {self._tokens_a_second(now)}{duration(left)} left"
            )

    def _tokens_a_second(self, now: float) -> str:
        return f"{self._tokens / (now - self.started):,.0f} tokens/s, " if self._tokens else ""


def figures(line: str) -> dict[str, Any]:
    """What a progress line says, for programs that collect logs; empty for any other line.

    Log lines pass through Dagster and through other processes as text, so the figures are read back from it.

    Returns:
        asset, partition (if it has one), done and total (of `unit`), per_second, tokens_per_second (if tokens were
        counted), seconds_left (if known).
    """
    found = _LINE.fullmatch(line)
    if not found:
        return {}
    said = {name: text for name, text in found.groupdict().items() if text is not None}
    left = _seconds(said.pop("left"))
    return {
        **said,
        **{name: int(said[name].replace(",", "")) for name in ("done", "total", "tokens_per_second") if name in said},
        "per_second": float(said["per_second"].replace(",", "")),
        **({} if left is None else {"seconds_left": left}),
    }


def _seconds(text: str) -> int | None:
    """What `duration` has put into words; None for `?`."""
    units = {"s": 1, "min": 60, "h": 3600}
    parts = re.findall(r"(\d+) (s|min|h)\b", text)
    return sum(int(number) * units[unit] for number, unit in parts) if parts else None


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42 s`, `3 min 20 s`, `2 h 5 min`; `?` if not finite."""
    if seconds != seconds or seconds == float("inf"):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
