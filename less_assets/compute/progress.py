"""Progress with an estimate of what is left, for everything that takes longer than a few seconds.

Belongs here: counting and wording. Where the lines go (Dagster's log, a terminal) is the caller's choice.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar

INTERVAL_SECONDS = 5.0
FIGURES: ContextVar[Mapping[str, str | float]] = ContextVar("figures", default={})  # noqa: B039 - nobody writes into it
"""What the line that is being logged says, for programs; empty outside a progress line.

A log takes a line as text. What formats it does so before the call returns, in the same thread, and finds here:
partition (if it has one), done and total (of `unit`), per_second, tokens_per_second (if tokens were counted),
seconds_left (if known).
"""


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
            self._say(now - self.started)

    def _say(self, seconds: float) -> None:
        rate = (self.done - self._done_before) / seconds
        tokens = f"{self._tokens / seconds:,.0f} tokens/s, " if self._tokens else ""
        left = (self.total - self.done) / rate if rate > 0 else math.inf
        figures: dict[str, str | float] = {"done": self.done, "total": self.total, "unit": self.unit}
        figures["per_second"] = round(rate, 3)
        if partition := self.what.partition(" ")[2]:
            figures["partition"] = partition
        if self._tokens:
            figures["tokens_per_second"] = round(self._tokens / seconds)
        if rate > 0:
            figures["seconds_left"] = round(left)
        token = FIGURES.set(figures)
        try:
            self._log(
                f"{self.what}: {self.done:,} of {self.total:,} {self.unit} ({100 * self.done / self.total:.0f} %), "
                f"{rate:,.1f} {self.unit}/s, {tokens}{duration(left)} left"
            )
        finally:
            FIGURES.reset(token)


def counted(number: int, noun: str) -> str:
    """A number with its noun, which takes an s for the plural: `1 task`, `2,000 tasks`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


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
