"""What a prefilter saves and what it loses, on the real pool: `python benchmarks/prefilter.py`.

The pool, drawn evenly from real sources, is scored for two tasks: once with gradients of all rows, and once with a
prefilter of each strategy. Then all select the same budget.

- `recall`: share of the rows selected from the whole pool that are still selected; beside it what the product itself
  estimates from its sample of the dropped rows, with the interval.
- `time`: processor seconds of the gradients, and of all that the prefilter needs besides, ÷ those of the gradients of
  the whole pool, at one checkpoint (with several, embeddings are still made once). Gradients are taken shard after
  shard, sides in turns. Processor seconds, so that it does not matter what else the machine does; loading models is
  not counted.

Figures go to `benchmarks/results/scale.json`.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from results import SCALE, merge
from selection_quality import BASE, EXAMPLES, WARMUP_LEARNING_RATE, draw_pool

from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.compute.step import make_artifact, make_together
from less_assets.lineage.lineage import Lineage
from less_assets.lineage.pool_files import PoolFiles
from less_assets.project.project import load_project
from less_assets.reading.files import SUBSET
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.store.tables import read_parquet

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("base_model", "instruction_pool", "refused_rows", "pool_index", "warmup_sample", "warmup_checkpoints")
SHARED += ("target_examples", "target_gradients")
FILTERING = ("pool_embeddings", "target_embeddings", "text_scores", "embedding_scores", "prefiltered_pool", "kept_rows")
SELECTING = ("gradient_datastore", "influence_scores", "recipe_settings", "selected_subset")
WHOLE = "whole pool"


class Side:
    """A project in a folder of its own, and what its artifacts took.

    Args:
        folder: With `project.yaml`.
    """

    def __init__(self, folder: Path) -> None:
        self.project = load_project(folder / "project.yaml")
        self.store = open_store(self.project)
        self.models = ModelLoader(self.project, cache_folder(self.store))
        self.seconds: Counter[str] = Counter()

    @property
    def lineage(self) -> Lineage:
        """The project as it stands."""
        return open_lineage(self.project, self.store)

    def make(self, names: Sequence[str]) -> None:
        """Make what is missing of some assets, in the order of the graph."""
        for name in (name for name in ASSETS if name in names):
            lineage = self.lineage
            partitions = ASSETS[name].partitions(self.project, lineage.keys_of)
            self.make_partitions(name, [key for key in partitions if lineage.status(name, key).state != "fresh"])

    def make_partitions(self, name: str, due: Sequence[str | None]) -> None:
        """Make partitions of an asset, and note the processor seconds."""
        lineage, asset = self.lineage, ASSETS[name]
        started = time.process_time()
        if asset.compute_together and due:
            list(make_together(lineage, name, list(map(str, due)), asset.compute_together, self.models, print))
        elif asset.compute:
            for key in due:
                make_artifact(lineage, name, key, asset.compute, self.models, print, resumable=asset.in_ranges)
        self.seconds[name] += time.process_time() - started

    def selected(self, task: str) -> set[str]:
        """Ids of the rows selected for a task."""
        table = read_parquet(self.lineage.folder("selected_subset", f"less|{task}"), SUBSET, ["example_id"])
        return set(table["example_id"])


def project_settings(asked: argparse.Namespace, pool: Sequence[Path]) -> dict[str, Any]:
    """The project file without a prefilter."""
    data = asked.data.absolute()
    return {
        "name": "prefilter",
        "model": {"base": BASE, "max_length": asked.max_length},
        "lora": {"rank": 8, "alpha": 32, "dropout": 0.0},
        "pool": {
            "shard_size": asked.shard_size,
            "sources": [{"name": path.stem, "path": str(path)} for path in pool],
        },
        "warmup": {"fraction": 0.1, "epochs": 1, "learning_rate": WARMUP_LEARNING_RATE, "batch_size": 4},
        "gradients": {"certificate_rows": 0, "real_step_rows": 0},
        "tasks": [
            {"name": task, "examples": {"format": task, "path": str(data / "tasks" / EXAMPLES[task])}}
            for task in asked.tasks
        ],
        "recipes": [{"name": "less", "strategy": "less", "fraction": asked.fraction}],
    }


def write_project(folder: Path, settings: dict[str, Any]) -> Side:
    """Write a project file and open it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "project.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return Side(folder)


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Make all sides; a line of the table for each strategy and task."""
    pool = draw_pool(asked, asked.data.absolute(), asked.work / "pool")
    settings = project_settings(asked, pool)
    whole = write_project(asked.work / "whole", settings)
    PoolFiles.scan(whole.project, whole.store)
    whole.make(SHARED)
    sides = {WHOLE: whole}
    for strategy in asked.strategies:
        folder = asked.work / strategy
        if not folder.exists():
            shutil.copytree(asked.work / "whole", folder)
        prefilter = {"strategy": strategy, "keep": asked.keep, "sample_rows": asked.sample_rows}
        sides[strategy] = write_project(folder, settings | {"prefilter": prefilter})
        if ASSETS["pool_embeddings"].exists(sides[strategy].project):
            sides[strategy].models.frozen_base()  # loading is not counted
        sides[strategy].make(FILTERING)
    for shard in whole.lineage.shards():
        for side in sides.values():
            key = f"{side.project.checkpoints[0]}|{shard}"
            side.models.checkpoint(side.lineage, side.project.checkpoints[0])
            side.make_partitions("train_gradients", [key])
    for side in sides.values():
        side.make(SELECTING)
    return [
        compare(asked, whole, sides[strategy], strategy, task) for strategy in asked.strategies for task in asked.tasks
    ]


def compare(asked: argparse.Namespace, whole: Side, side: Side, strategy: str, task: str) -> dict[str, Any]:
    """What a prefilter kept, lost and saved."""
    wanted, lineage = whole.selected(task), side.lineage
    found = lineage.summary("selected_subset", f"less|{task}")
    counts = lineage.summary("influence_scores", task)["prefilter"]
    filtering, gradients = sum(side.seconds[name] for name in FILTERING), side.seconds["train_gradients"]
    return {
        "strategy": strategy,
        "task": task,
        "keep": asked.keep,
        "rows": counts["rows"],
        "kept": counts["kept"],
        "sampled": counts["sampled"],
        "selected": len(wanted),
        "recall": len(wanted & side.selected(task)) / len(wanted),
        "estimate": [found[name] for name in ("recall", "recall_low", "recall_high")],
        "time": (filtering + gradients) / whole.seconds["train_gradients"],
        "time_of_filtering": filtering / whole.seconds["train_gradients"],
        "seconds_of_whole_pool": whole.seconds["train_gradients"],
    }


def as_markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table of docs/scaling.md."""
    rows = [
        "| prefilter | task | rows with gradients | recall | estimated by the run | time |",
        "|---|---|---|---|---|---|",
    ]
    for found in lines:
        estimate, low, high = found["estimate"]
        kept = f"{found['kept']:,} + {found['sampled']:,} of {found['rows']:,}"
        rows.append(
            f"| `{found['strategy']}` | {found['task']} | {kept} | {found['recall']:.2f} "
            f"| {estimate:.2f} [{low:.2f}, {high:.2f}] | {found['time']:.2f} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options, measure, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--row-length", type=int, default=96, help="longest pool row that is drawn, in tokens")
    parser.add_argument("--max-length", type=int, default=256, help="longest row and target, in tokens")
    parser.add_argument("--shard-size", type=int, default=100)
    parser.add_argument("--fraction", type=float, default=0.05, help="budget of the selection")
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--sample-rows", type=int, default=150)
    parser.add_argument("--strategies", nargs="+", default=["bm25", "rds"])
    parser.add_argument("--tasks", nargs="+", choices=list(EXAMPLES), default=["gsm8k", "tydiqa"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "artifacts" / "prefilter")
    parser.add_argument("--out", type=Path, default=SCALE)
    asked = parser.parse_args(arguments)
    asked.work = asked.work.absolute()
    lines = measure(asked)
    figures: dict[str, Any] = {}
    for name in ("recall", "time"):
        values = {key: [line[name] for line in lines if line["strategy"] == key] for key in asked.strategies}
        figures[f"prefilter_{name}"] = {key: sum(of_tasks) / len(of_tasks) for key, of_tasks in values.items()}
    merge(asked.out, {**figures, "prefilter_lines": lines})
    print(as_markdown(lines))


if __name__ == "__main__":
    main()
