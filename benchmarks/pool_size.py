"""Index, warm-up draw and selection of 5 % from synthetic pools: peak memory, and whether time grows with the rows.

    python benchmarks/pool_size.py                          # 1 M rows and 10 M rows, into benchmarks/results/scale.json
    python benchmarks/pool_size.py --rows 100000 1000000    # other sizes: printed only

The tables of the pool and its scores are written as the store holds them (about 1 kB of messages a row; 1 % of the rows
are copies), and everything else that the steps need by stand-ins. Then each step runs as the product runs it, in a
process of its own: `pool_index`, `warmup_sample` (0.5 %), `selected_subset` (5 %, in turns of three subtasks), each
with what it shows of itself. Ten million rows take about 8 GB of disk.

`pool_10m_peak_gib`: highest resident memory of a step at 10 M rows. `pool_growth_error`: processor seconds of a row in
all three steps at the largest size over those at the smallest, minus 1; negative where a row got cheaper. Processor
seconds, so that it does not matter what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from results import SCALE, merge
from scoring import peak_gib
from tiny_project import WORDS, write_project

from less_assets.compute.models import ModelLoader, cache_folder
from less_assets.compute.step import Compute, StepInputs, StepResult, make_artifact, make_together
from less_assets.lineage.pool_files import LEDGER_FILE
from less_assets.method.data.examples import POOL_SCHEMA
from less_assets.method.selection.influence import score_table
from less_assets.method.selection.selection import SELECTION_SCHEMA  # noqa: F401 - imported before the clock starts
from less_assets.project.project import load_project
from less_assets.reading.files import EXAMPLES, REFUSED, SUBTASKS, score_file
from less_assets.reading.rows import pool_rows
from less_assets.report import charts  # noqa: F401 - likewise
from less_assets.steps.pool import NOTHING_REFUSED
from less_assets.steps.registry import ASSETS, open_lineage, open_store
from less_assets.steps.shown import Stored
from less_assets.store.files import write_atomically
from less_assets.store.tables import write_json, write_parquet

SHARD_ROWS = 131_072
ANSWER_WORDS = 150
DISTINCT_TEXTS = 8192
COPY_EVERY = 100
SUBTASK_LABELS = ["part-0", "part-1", "part-2"]
STAND_INS = {
    "base_model": {},
    "warmup_checkpoints": {"mean_learning_rate": 1e-3},
    "train_gradients": {},
    "gradient_datastore": {},
    "target_examples": {"examples_digest": ""},
    "target_gradients": {},
}
STEPS = {"pool_index": None, "warmup_sample": None, "selected_subset": "recipe-0|task-0"}


def write_pool(folder: Path, rows: int, shard_rows: int) -> None:
    """The project, its ledger, and the tables of all shards."""
    path = write_project(folder, rows=30, shard_size=shard_rows)
    settings = yaml.safe_load(path.read_text())
    settings["warmup"]["fraction"] = 0.005
    settings["recipes"] = [{"name": "recipe-0", "strategy": "less", "aggregate": "round_robin", "fraction": 0.05}]
    path.write_text(yaml.safe_dump(settings))
    project = load_project(str(path))
    counts = [min(shard_rows, rows - first) for first in range(0, rows, shard_rows)]
    shards = [
        {
            "key": f"pool-{number:05d}",
            "source": "pool",
            "segments": [
                {"path": "pool.jsonl", "first_row": number * shard_rows, "rows": count, "digest": str(number)}
            ],
        }
        for number, count in enumerate(counts)
    ]
    write_atomically(
        open_store(project).root / LEDGER_FILE, json.dumps({"files": {"pool": []}, "shards": shards}).encode()
    )
    table = _examples(counts[0])

    def shard(work: StepInputs) -> StepResult:
        number = int(work.partition.rpartition("-")[2])
        write_parquet(work.folder, EXAMPLES, table.head(counts[number]).with_columns(_ids(number, counts[number])))
        return StepResult({}, data_version=f"{number:064x}")

    def refused(work: StepInputs) -> StepResult:
        texts = dict.fromkeys(("example_id", "status", "detail"), pl.String)
        write_parquet(work.folder, REFUSED, pl.DataFrame(schema=texts | {"row": pl.Int64}))
        return StepResult({}, data_version=NOTHING_REFUSED)

    for asset, compute in (("base_model", _stand_in), ("instruction_pool", shard), ("refused_rows", refused)):
        _make_all(str(path), asset, compute)


def _examples(rows: int) -> pl.DataFrame:
    """Rows of a shard but for their ids; every shard says the same."""
    random = np.random.default_rng(0)
    words = np.array(WORDS)
    texts = [" ".join(words[random.integers(0, len(words), ANSWER_WORDS)]) for _ in range(min(rows, DISTINCT_TEXTS))]
    told = [[{"role": "user", "content": text[:100]}, {"role": "assistant", "content": text}] for text in texts]
    turns = [told[place % len(told)] for place in range(rows)]
    filled = {"source": "pool", "status": "ok", "source_file": "pool.jsonl"}
    return pl.DataFrame({"messages": turns, "source_row": range(rows)}).select(
        (pl.col(name) if name in ("messages", "source_row") else pl.lit(filled.get(name)))
        .alias(name)
        .cast(kind, strict=False)
        for name, kind in {**POOL_SCHEMA, "source_file": pl.String}.items()
    )


def _ids(number: int, rows: int) -> pl.Series:
    """Ids of a shard's rows, of which every hundredth is that of another row, in another shard but for the first."""
    random = np.random.default_rng([1, number])
    halves = random.integers(0, 2**63, (rows, 2), dtype=np.int64)
    copies = np.arange(0, rows, COPY_EVERY)
    halves[copies] = np.random.default_rng([1, number // 2]).integers(0, 2**63, (rows, 2), dtype=np.int64)[copies]
    return pl.Series("example_id", [f"{high:016x}{low:016x}" for high, low in halves.tolist()])


def write_scores(folder: Path) -> None:
    """Score tables of all shards, and stand-ins for what they would be made from."""
    path = str(folder / "project.yaml")
    for asset in STAND_INS:
        _make_all(path, asset, _stand_in)

    def scores(works: Any) -> list[StepResult]:
        (work,) = works
        rows = 0
        for number, shard in enumerate(work.lineage.shards()):
            pool = pool_rows(work.lineage, shard, ["example_id", "source", "status"])
            place = pl.int_range(pl.len(), dtype=pl.Int64).alias("row")
            table = pool.with_columns(pl.lit(shard).alias("shard"), place, pl.lit(80, pl.Int32).alias("loss_tokens"))
            random = np.random.default_rng([2, number])
            values = random.standard_normal((2, table.height, len(SUBTASK_LABELS)), dtype=np.float32)
            columns = dict(zip(("adamw.mean_cosine", "adamw.mean_gradient"), values, strict=True))
            write_parquet(work.folder, score_file(shard), score_table(table, columns))
            rows += table.height
        write_json(work.folder, SUBTASKS, SUBTASK_LABELS)  # type: ignore[arg-type]
        summary = {"rows": rows, "scored": rows, "subtasks": SUBTASK_LABELS, "forms": ["adamw"]}
        return [StepResult(summary)]

    project = load_project(path)
    store = open_store(project)
    models = ModelLoader(project, cache_folder(store))
    list(make_together(open_lineage(project, store), "influence_scores", ["task-0"], scores, models, str))
    _make_all(path, "recipe_settings", ASSETS["recipe_settings"].compute)


def _stand_in(work: StepInputs) -> StepResult:
    asset = work.name.split()[0]
    write_json(work.folder, "stand_in.json", None)
    return StepResult({"sketch_digest": "", **STAND_INS[asset]})


def _make_all(path: str, asset: str, compute: Compute | None) -> None:
    """All partitions of an asset, by another function than its own."""
    assert compute is not None
    project = load_project(path)
    store = open_store(project)
    lineage, models = open_lineage(project, store), ModelLoader(project, cache_folder(store))
    for partition in ASSETS[asset].partitions(project, lineage.keys_of):
        make_artifact(lineage, asset, partition, compute, models, str, resumable=False)


def run_step(folder: Path, asset: str) -> dict[str, float]:
    """Seconds and peak memory of a step, with what it shows of itself."""
    project = load_project(str(folder / "project.yaml"))
    store = open_store(project)
    declared, partition = ASSETS[asset], STEPS[asset]
    assert declared.compute is not None
    models = ModelLoader(project, cache_folder(store))
    started, began = time.process_time(), time.perf_counter()
    lineage = open_lineage(project, store)
    manifest = make_artifact(lineage, asset, partition, declared.compute, models, str, resumable=False)
    computed = time.process_time()
    artifact = store.artifact(manifest.key, manifest.fingerprint)
    declared.describe(Stored(lineage, partition or "", artifact, manifest))
    finished = time.process_time()
    wall = time.perf_counter() - began
    return {"seconds": finished - started, "shown_s": finished - computed, "wall_s": wall, "peak_gib": peak_gib()}


def in_a_process(part: str, folder: str, rows: int, shard_rows: int) -> Any:
    """What a part answers in a process of its own."""
    options = {"--part": part, "--folder": folder, "--rows": rows, "--shard-rows": shard_rows}
    told = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-W", "ignore", __file__, *told]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def measure(rows: int, shard_rows: int, parent: str | None) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of each step at a size."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        in_a_process("pool", folder, rows, shard_rows)
        found = {}
        for asset in STEPS:
            if asset == "selected_subset":
                in_a_process("scores", folder, rows, shard_rows)
            found[asset] = in_a_process(asset, folder, rows, shard_rows)
            numbers = ", ".join(f"{name} {value:.2f}" for name, value in found[asset].items())
            print(f"  {rows} rows, {asset}: {numbers}", file=sys.stderr, flush=True)
        return found


def figures(measured: dict[int, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """The keys of the result file."""
    smallest, largest = min(measured), max(measured)
    seconds = {rows: sum(step["seconds"] for step in steps.values()) for rows, steps in measured.items()}
    return {
        "pool_10m_peak_gib": max(step["peak_gib"] for step in measured[largest].values()),
        "pool_growth_error": (seconds[largest] / largest) / (seconds[smallest] / smallest) - 1,
        "pool_rows": {str(rows): steps for rows, steps in measured.items()},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write where the sizes are those of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1_000_000, 10_000_000])
    parser.add_argument("--shard-rows", type=int, default=SHARD_ROWS)
    parser.add_argument("--folder", help="where the pools are written (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="result file (default: scale.json, for the default sizes only)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    parts: dict[str, Callable[[], Any]] = {
        "pool": lambda: write_pool(Path(asked.folder), asked.rows[0], asked.shard_rows),
        "scores": lambda: write_scores(Path(asked.folder)),
        **{asset: lambda: run_step(Path(asked.folder), asked.part) for asset in STEPS},
    }
    if asked.part:
        print(json.dumps(parts[asked.part]()))
        return
    found = figures({rows: measure(rows, asked.shard_rows, asked.folder) for rows in asked.rows})
    print(json.dumps(found, indent=1))
    is_full = asked.rows == parser.get_default("rows")
    if out := asked.out or (SCALE if is_full else None):
        merge(out, found)


if __name__ == "__main__":
    main()
