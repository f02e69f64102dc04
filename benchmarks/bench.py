"""`make bench`: all speed figures, into `benchmarks/results/features.json` and `scale.json`.

    python benchmarks/bench.py                          # everything: many hours on two cores, on a quiet machine
    python benchmarks/bench.py --only threads idle      # some parts; `make bench ONLY="threads idle"` is the same
    python benchmarks/bench.py --list                   # which part writes which keys

Each part is a script of this folder, in a process of its own, which merges its keys into the file and leaves the
others. A part that fails is named at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from results import FEATURES, SCALE


@dataclass(frozen=True)
class Part:
    """A script that measures something.

    Attributes:
        command: The script and its options.
        out: The file it merges its keys into.
        keys: The keys that people compare; there may be more, which the script explains.
    """

    command: tuple[str, ...]
    out: Path
    keys: tuple[str, ...]


def _scale(section: str, *keys: str) -> Part:
    return Part(("scale.py", "--only", section), SCALE, keys)


PARTS = {
    "features": Part(("features.py",), FEATURES, ("features_over_training_step", "over_bergson", "over_reference_way")),
    "threads": Part(("threads.py",), FEATURES, ("busy_two_threads_over_one", "quiet_passive_over_default")),
    "training": Part(("training.py",), FEATURES, ("training_over_landed", "training_loss_deviation")),
    "attribution": _scale("attribution", "attribution_over_extraction"),
    "checks": _scale("checks", "checks_over_extraction", "checks_after_adding"),
    "idle": _scale("idle", "idle_plan_seconds"),
    "padding": _scale("padding", "padding"),
    "scoring": _scale("scoring", "scoring_over_matmul", "scoring_peak_gib"),
    "linearity": _scale("linearity", "linearity_error"),
    "overhead": _scale("overhead", "orchestration_overhead"),
    "load": _scale("load", "load_seconds"),
    "append": _scale("append", "partitions_for_new_shard"),
    "ray": _scale("ray", "ray_speedup"),
    "demo": Part(("demo.py",), SCALE, ("demo_over_landed", "first_subset_over_demo")),
    "pool": Part(("pool_size.py",), SCALE, ("pool_10m_peak_gib", "pool_growth_error")),
    "prefilter": Part(("prefilter.py",), SCALE, ("prefilter_recall", "prefilter_time")),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--list", action="store_true", help="print the parts and their keys, run nothing")
    asked = parser.parse_args(arguments)
    if asked.list:
        for name, part in PARTS.items():
            print(f"{name:12} {part.out.name:14} {', '.join(part.keys)}")
        return
    failed = []
    for name in asked.only:
        script, *options = PARTS[name].command
        print(f"{name}:", flush=True)
        command = [sys.executable, str(Path(__file__).with_name(script)), *options]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the other figures are written")


if __name__ == "__main__":
    main()
