"""How OpenMP's threads wait for each other, decided before torch is loaded: its OpenMP reads the setting once.

Belongs here: the setting and what it depends on. Not here: the number of threads, which is the user's or torch's.

Threads that wait spin, by default for milliseconds. On a quiet machine that saves waking them up, 50 % of the time with
small batches. Where another process keeps a core busy, threads spin while the one they wait for has no core: two
threads become slower than one, by 2 to 20 times. No number of spins serves both (`benchmarks/threads.py`), so a process
looks at the machine when it starts: where something else runs, its threads wait asleep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from statistics import median

WAIT_POLICY = "OMP_WAIT_POLICY"
SPIN_COUNT = "GOMP_SPINCOUNT"
CHOSEN = "LESS_ASSETS_WAIT_POLICY"
"""Marks the setting as this package's, so that a process started by another one looks again."""
_ASLEEP = "PASSIVE"
_SAMPLES, _SECONDS_BETWEEN = 8, 0.005


def choose_wait_policy(
    environment: MutableMapping[str, str] = os.environ, others_running: Callable[[], float] | None = None
) -> None:
    """Let OpenMP's threads wait asleep if the machine has something else to do, unless the user has set how they wait.

    Args:
        environment: Where OpenMP's settings are; changed in place.
        others_running: Says how many other threads want a processor now; default `others_running` of this module.
    """
    if environment.pop(CHOSEN, None) and environment.get(WAIT_POLICY) == _ASLEEP:
        del environment[WAIT_POLICY]
    if WAIT_POLICY in environment or SPIN_COUNT in environment:
        return
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = environment.get("OMP_NUM_THREADS", "")
    threads = int(wanted) if wanted.isdecimal() else processors
    if threads < 2:
        return
    others = (others_running or _others_running)()
    if others >= 1 and others + threads > processors:
        environment[WAIT_POLICY] = _ASLEEP
        environment[CHOSEN] = "busy"


def _others_running() -> float:
    """Other threads that run or wait for a processor: median over 40 ms; 0 where the system does not say."""
    samples = []
    try:
        for _ in range(_SAMPLES):
            running = Path("/proc/loadavg").read_text().split()[3].partition("/")[0]
            samples.append(int(running) - 1)  # this thread is one of them
            time.sleep(_SECONDS_BETWEEN)
    except (OSError, ValueError, IndexError):
        return 0
    return median(samples)
