"""Two OpenMP threads against one while another process keeps a core busy, and waiting asleep against spinning.

    python benchmarks/threads.py                    # both figures, into benchmarks/results/features.json
    python benchmarks/threads.py --spins 0 1000     # other numbers of spins beside ours: printed only
    python benchmarks/threads.py --rounds 2         # a trial, which writes nothing

Every side is a process of its own that waits for its turn, because OpenMP reads its settings once, when torch is
loaded, and the package looks at the machine once, before that (`less_assets.openmp`): sides are started in the
condition in which they are measured. They take turns; the work is `extract_features` on a model with SmolLM2-135M's
layers, fewer of them, and random weights. A round counts only if nothing else ran meanwhile; the benchmark waits for
such moments, and a figure is null where there were too few.

`busy_two_threads_over_one`: speed of two threads with the package's setting over that of one thread, while a process
beside them never rests. `quiet_passive_over_default`: speed of two threads with the package's setting over that with
OpenMP's own, with nothing beside. Both are medians over rounds; above 1 the package's setting is faster.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from results import FEATURES, merge
from turns import ROOT, Side, serve

SPINS_OF_OPENMP = "300000"
"""Where nothing is set, libgomp's documented `GOMP_SPINCOUNT`."""
MOST_OTHERS = 0.15
"""Processors that others may keep busy during a round that counts."""
LEAST_ROUNDS = 5
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "LESS_ASSETS_WAIT_POLICY")


def work() -> None:
    """What a side does: answer with the seconds that some rows' features took, whenever a line comes in."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from less_assets.method.data.chat import EncodedExample
    from less_assets.method.gradients.features import extract_features
    from less_assets.method.gradients.per_example import lora_parameters
    from less_assets.method.gradients.sketch import Sketch
    from less_assets.method.training.models import resolve_dtype

    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(resolve_dtype("auto", torch.device("cpu")))
    model = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    sketch = Sketch("sparse", 8192, 0, lora_parameters(model))
    random = np.random.default_rng(0)
    tokens = random.integers(3, 8192, (16, 64)).astype(np.int32)
    rows = [EncodedExample(str(index), row, row) for index, row in enumerate(tokens)]

    def turn() -> float:
        started = time.perf_counter()
        extract_features(model, rows, forms=("sgd",), moments=None, sketch=sketch, token_budget=512, pad_token_id=0)
        return time.perf_counter() - started

    serve(turn)


@contextmanager
def busy_core() -> Iterator[int]:
    """A process that computes without end; its id."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def seconds_worked() -> float:
    """Seconds that all processors have worked since the machine was started, in all processes together."""
    ticks = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


@contextmanager
def others_meanwhile(ours: Callable[[], float]) -> Iterator[list[float]]:
    """Appends, at its end, the number of processors that others have kept busy meanwhile.

    Args:
        ours: Seconds that this benchmark's processes have worked so far.
    """
    others: list[float] = []
    started, worked, worked_by_us = time.perf_counter(), seconds_worked(), ours()
    yield others
    time_taken = time.perf_counter() - started
    others.append(max(0.0, seconds_worked() - worked - (ours() - worked_by_us)) / time_taken)


def side(**settings: str) -> Side:
    """A side with nothing of OpenMP's set but these."""
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return Side([__file__, "--side"], environment | {"PYTHONPATH": str(ROOT)} | settings)


def wait_for_quiet(deadline: float, ours: Callable[[], float]) -> None:
    """Sleep until nothing else runs, or until the deadline by `time.monotonic`."""
    others = [MOST_OTHERS + 1.0]
    while others[0] > MOST_OTHERS and time.monotonic() < deadline:
        time.sleep(1)
        with others_meanwhile(ours) as others:
            time.sleep(0.3)


def take_turns(
    settings: dict[str, dict[str, str]], rounds: int, deadline: float, beside: list[int]
) -> list[dict[str, float]]:
    """Seconds of each side in the rounds in which nothing else ran.

    Args:
        settings: Side -> its environment; each is started while nothing else runs.
        rounds: Counted rounds that suffice.
        deadline: When to stop, by `time.monotonic`.
        beside: Process ids of this benchmark beside the sides.
    """
    sides: dict[str, Side] = {}

    def worked_by_us() -> float:
        return sum(seconds_of(pid) for pid in [os.getpid(), *beside, *(side.pid for side in sides.values())])

    for name, environment in settings.items():
        wait_for_quiet(deadline, worked_by_us)
        sides[name] = side(**environment)
    counted: list[dict[str, float]] = []
    number = 0
    try:
        while len(counted) < rounds and time.monotonic() < deadline:
            wait_for_quiet(deadline, worked_by_us)
            number += 1
            with others_meanwhile(worked_by_us) as others:
                taken = {name: sides[name]() for name in sorted(sides, reverse=bool(number % 2))}
            if others[0] <= MOST_OTHERS:
                counted.append(taken)
                print("  " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in taken.items()), flush=True)
    finally:
        for one in sides.values():
            one.close()
    return counted


def seconds_of(pid: int) -> float:
    """Seconds that a process has worked."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ratio(rounds: list[dict[str, float]], slow: str, fast: str) -> float | None:
    """Median over rounds of how many times faster `fast` is; None where too few rounds counted."""
    return median(taken[slow] / taken[fast] for taken in rounds) if len(rounds) >= LEAST_ROUNDS else None


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=10, help="wait so long for the machine to be quiet")
    parser.add_argument(
        "--spins", nargs="+", default=[], help="values of GOMP_SPINCOUNT to compare; nothing is written"
    )
    parser.add_argument("--out", type=Path, default=FEATURES)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.side:
        work()
        return
    two = {"OMP_NUM_THREADS": "2"}
    sides = {"one thread": {"OMP_NUM_THREADS": "1"}, "OpenMP's": two | {"GOMP_SPINCOUNT": SPINS_OF_OPENMP}, "ours": two}
    sides |= {f"{spins} spins": two | {"GOMP_SPINCOUNT": spins} for spins in asked.spins}
    half = asked.minutes * 30
    print("quiet:", flush=True)
    quiet = take_turns(sides, asked.rounds, time.monotonic() + half, [])
    print("busy:", flush=True)
    with busy_core() as pid:
        busy = take_turns(sides, asked.rounds, time.monotonic() + half, [pid])
    for name in list(sides)[1:]:
        print(name, "busy over one thread", ratio(busy, "one thread", name), "quiet", ratio(quiet, "OpenMP's", name))
    if not asked.spins and asked.rounds >= LEAST_ROUNDS:
        results = {
            "busy_two_threads_over_one": ratio(busy, "one thread", "ours"),
            "quiet_passive_over_default": ratio(quiet, "OpenMP's", "ours"),
            "busy_rounds": len(busy),
            "quiet_rounds": len(quiet),
        }
        merge(asked.out, results)


if __name__ == "__main__":
    main()
