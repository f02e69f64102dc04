"""The demo as it is against the demo as it landed (commit b31d571): wall clock, and how soon rows are selected.

    python benchmarks/demo.py              # two rounds, sides in turns: about half an hour on two cores
    python benchmarks/demo.py --small      # a tenth of the pool: do both sides run?

Each side writes the demo's data and runs its whole graph in a folder of its own, with the package of its commit; both
find the packages of this environment. Nothing is stored before. `demo_over_landed` is the median over rounds of today's
seconds over the landed ones; `first_subset_over_demo` is when today's `run` says where the first selected rows lie,
over the seconds that it takes in all, data included. `demo_seconds` and `demo_landed_seconds` are the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from results import SCALE, merge
from turns import LANDED, ROOT, tree_of


def smaller(settings: dict[str, Any]) -> None:
    """Make a tenth of the demo's project of it."""
    settings["pool"]["sources"] = [{**source, "limit": 6} for source in settings["pool"]["sources"][:4]]
    for task in settings["tasks"]:
        task["evaluation"]["limit"] = 4
    settings["warmup"] |= {"epochs": 1, "fraction": 0.5}
    settings["recipes"] = [recipe for recipe in settings["recipes"] if recipe["name"] != "random"]


def _shrink(path: Path) -> None:
    settings = yaml.safe_load(path.read_text())
    smaller(settings)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))


def _environment(tree: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("DAGSTER_HOME", "LESS_PROJECT")}
    return kept | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}


def landed(tree: Path, *, small: bool) -> dict[str, float]:
    """Seconds of the landed demo in its tree, as `make demo` ran it."""
    (tree / ".dagster").mkdir()
    shutil.copy(tree / "dagster.yaml", tree / ".dagster")
    project = tree / "projects/demo.yaml"
    if small:
        _shrink(project)
    environment = _environment(tree) | {"DAGSTER_HOME": str(tree / ".dagster"), "LESS_PROJECT": str(project)}
    started = time.perf_counter()
    for command in (["less_assets.demo", "demo_data"], ["less_assets.cli", "run"]):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", *command],
            cwd=tree,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return {"seconds": time.perf_counter() - started}


def today(folder: Path, *, small: bool) -> dict[str, float]:
    """Seconds of today's demo in an empty folder, and until the first subset is announced."""
    command, environment = [sys.executable, "-W", "ignore", "-m", "less_assets.cli"], _environment(ROOT)
    project = folder / "project.yaml"
    started = time.perf_counter()
    subprocess.run([*command, "demo", str(folder), "--no-run"], env=environment, check=True, stdout=subprocess.DEVNULL)
    if small:
        _shrink(project)
    first = None
    with subprocess.Popen(
        [*command, "run", "--project", str(project), "--json"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if first is None and json.loads(line).get("event") == "subset":
                first = time.perf_counter() - started
    if process.returncode or first is None:
        raise RuntimeError(f"today's demo ended with {process.returncode}, first subset after {first} s")
    return {"seconds": time.perf_counter() - started, "first_subset": first}


def take_turns(rounds: int, *, small: bool) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The landed side and today's, round by round."""
    found = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            tree = tree_of(LANDED, Path(folder) / "landed", "less_assets", "projects", "dagster.yaml")
            before = landed(tree, small=small)
            found.append((before, today(Path(folder) / "today", small=small)))
        print(f"  landed {before['seconds']:.0f} s, today {found[-1][1]}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both sides and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="a trial: its figures mean nothing, and need --out")
    parser.add_argument("--out", type=Path, default=SCALE)
    asked = parser.parse_args(arguments)
    if asked.small and asked.out == SCALE:
        parser.error("--small needs --out: its figures do not belong into the results")
    found = take_turns(asked.rounds, small=asked.small)
    figures = {
        "demo_over_landed": median(after["seconds"] / before["seconds"] for before, after in found),
        "first_subset_over_demo": median(after["first_subset"] / after["seconds"] for _, after in found),
        "demo_seconds": median(after["seconds"] for _, after in found),
        "demo_landed_seconds": median(before["seconds"] for before, _ in found),
    }
    print(json.dumps(figures, indent=1))
    merge(asked.out, figures)


if __name__ == "__main__":
    main()
