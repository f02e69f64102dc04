"""From features to a ranked subset: influence scores per task, the recipe as resolved, the selected rows.

Belongs here: wiring only. Mathematics is `method/selection/`; which scores a recipe ranks by is `ranking.py`.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.speeds import Guess
from less_assets.compute.step import StepInputs, StepResult
from less_assets.compute.workload import Amount, Workload
from less_assets.lineage.lineage import Input, Keys, Lineage, split
from less_assets.lineage.plan import Versions, digest
from less_assets.project.project import Project
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.files import (
    PASSED_OVER,
    POOL_SCORES,
    PREFILTER_SAMPLE,
    SUBSET,
    SUBSET_JSONL,
    SUBTASKS,
    TARGET_FEATURES,
    score_file,
)
from less_assets.reading.rows import checkpoint_weights, conversations_of, pool_rows
from less_assets.reading.shard_features import PREFILTERED, ShardFeatures
from less_assets.reading.subsets import chooses_rows
from less_assets.reading.tournaments import selecting_recipe
from less_assets.steps.asset import ROW_COLUMNS, Asset
from less_assets.steps.checks import (
    influence_is_real,
    no_subtask_dominates,
    not_only_very_short_rows,
    prefilter_loses_little,
    sketch_is_faithful,
)
from less_assets.steps.gradients import require_same_sketch
from less_assets.steps.prefilter import estimated_recall, prefilter_counts, sampled_rows
from less_assets.steps.ranking import SCORE_ASSETS, Pool, aggregate_of, scored_pool, select_rows
from less_assets.steps.shown import TABLE_ROWS, Command, Picture, ReportLink, ReportLinks, Shown, Stored, Table
from less_assets.store.files import working_folder, written_file
from less_assets.store.tables import read_parquet, write_json, write_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.selection import Candidates, Selection

RANKING_SECONDS = 2e-5
"""Ranking a row of the pool on one two-core machine."""
CHART_SCORES = 20_000
"""Scores kept for the histogram: enough for its bins, small for any pool."""
ROWS_PER_FILE = 65_536
"""Selected rows whose messages are in memory at a time."""


def score_pool(works: Sequence[StepInputs]) -> list[StepResult]:
    """Score the pool for some tasks: shard by shard, all tasks, checkpoints, forms and subtask rules in one pass."""
    from less_assets.method.selection.influence import row_statuses, score_shard, score_table

    lineage, project = works[0].lineage, works[0].project
    weights = checkpoint_weights(lineage)
    checkpoints, forms = list(weights), project.gradients.forms
    labels: dict[str, list[str]] = {}
    directions: dict[str, dict[tuple[str, str], np.ndarray]] = {name: {} for name in checkpoints}
    for work in works:
        labels[work.partition], of_task = directions_of(lineage, work.partition)
        for name in checkpoints:
            directions[name] |= of_task[name]
    scored = rows = 0
    progress = works[0].progress(lineage.summary("pool_index")["usable"], f"rows for {len(works)} tasks")
    samples: dict[str, list[pl.DataFrame]] = {work.partition: [] for work in works}
    for shard in lineage.shards():
        features = {name: ShardFeatures.of(lineage, name, shard) for name in checkpoints}
        pool = pool_rows(lineage, shard, ["example_id", "source", "status"])
        status = row_statuses(pool["status"].to_list(), {name: stored.status for name, stored in features.items()})
        table = pool.with_columns(
            pl.lit(shard).alias("shard"),
            pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
            pl.Series("status", status),
            features[checkpoints[0]].loss_tokens,
        )
        scores = score_shard({name: stored.reader for name, stored in features.items()}, directions, weights, forms)
        spread = {
            task: {name: features[checkpoints[0]].spread(column) for name, column in columns.items()}
            for task, columns in scores.items()
        }
        if sampled := sampled_rows(lineage, shard):
            for task, parts in samples.items():
                parts.append(score_table(table, spread[task])[sampled])
            table = table.with_columns(table["status"].scatter(sampled, PREFILTERED))
        for work in works:
            write_parquet(work.folder, score_file(shard), score_table(table, spread[work.partition]))
        rows, usable = rows + table.height, table.filter(pl.col("status") == "ok").height
        scored += usable
        progress(usable)
    results: list[StepResult] = []
    for work in works:
        own = labels[work.partition]
        write_json(work.folder, SUBTASKS, own)  # type: ignore[arg-type]
        summary = {"rows": rows, "scored": scored, "subtasks": own, "weights": weights, "forms": list(forms)}
        if project.prefilter:
            summary["prefilter"] = prefilter_counts(lineage)
            if parts := samples[work.partition]:
                write_parquet(work.folder, PREFILTER_SAMPLE, pl.concat(parts))
        # One pass for all: counted once.
        units = scored * len(forms) * len(checkpoints) if not results else 0
        results.append(StepResult(summary, units=units))
    return results


def directions_of(lineage: Lineage, task: str) -> tuple[list[str], dict[str, dict[tuple[str, str], np.ndarray]]]:
    """The task's subtasks, and by checkpoint, task and subtask rule its target directions, float32 (J, k)."""
    from less_assets.method.selection.influence import SUBTASK_RULES, target_directions

    labels: list[str] = []
    directions: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for checkpoint in checkpoint_weights(lineage):
        key = f"{checkpoint}|{task}"
        sketches: dict[str, str] = {}
        for asset, partition in (("gradient_datastore", checkpoint), ("target_gradients", key)):
            require_same_sketch(sketches, f"{asset} {partition}", lineage.summary(asset, partition)["sketch_digest"])
        table = read_parquet(lineage.folder("target_gradients", key), TARGET_FEATURES)
        features = np.stack(list(table["features"].to_numpy()))
        directions[checkpoint] = {}
        for rule in SUBTASK_RULES:
            labels, directions[checkpoint][task, rule] = target_directions(features, table["subtask"].to_list(), rule)
    return labels, directions


def resolve_recipe(work: StepInputs) -> StepResult:
    """Write the resolved recipe; its version is its content."""
    settings = work.project.recipe_settings(work.partition)
    write_json(work.folder, "recipe.json", settings)
    return StepResult({"recipe": settings}, data_version=digest(settings))


def select_subset(work: StepInputs) -> StepResult:
    """Rank the pool by the recipe, cut at the budget, and add the messages."""
    recipe_key, task = split(work.partition)
    recipe = selecting_recipe(work.lineage, recipe_key, task)
    named = work.project.recipe(recipe_key)
    chosen = {"selected_as": recipe.name} if named.tournament else {}
    return store_selection(work, recipe, task, {"recipe": named.name, **chosen})


def store_selection(
    work: StepInputs, recipe: ResolvedRecipe, task: str, named: Mapping[str, Any], *, explained: bool = True
) -> StepResult:
    """Select as a recipe does, and store the rows.

    Args:
        work: Reads the pool and the scores, and writes.
        recipe: How to select; its `key` is that of the recipe whose scores it reads.
        task: The task.
        named: What the summary calls the selection.
        explained: Whether to store also what only explains it: scores of the pool, rows that were passed over.
    """
    from less_assets.method.selection.selection import SELECTION_SCHEMA

    selection = _select(work, recipe, task, explained=explained)
    counts: dict[str, Any] = {}
    if selection is None:
        table = pl.DataFrame(schema=SELECTION_SCHEMA)
        _write_rows(work, table)
    else:
        table, counted = selection.table, selection.summary
        counts = {
            "usable": counted.usable,
            "loss_tokens": counted.loss_tokens,
            "sources": counted.rows_per_source,
            "subtasks": counted.rows_per_subtask,
            "cut_scores": counted.cut_scores,
            "removed": counted.removed,
            "very_short": _write_rows(work, table),
        }
        if explained and (recipe.quotas or recipe.near_duplicates is not None):
            write_parquet(work.folder, PASSED_OVER, selection.passed_over)
        if recall := estimated_recall(work.lineage, recipe, task, selection.table):
            counts |= {"recall": recall.estimate, "recall_low": recall.low, "recall_high": recall.high}
    pool_sources = work.lineage.summary("pool_index")["sources"] if selection else {}
    summary = {**named, "rows": table.height, **counts, "pool_sources": pool_sources}
    version = digest(["selected", *table["example_id"].to_list()])
    ranked = work.lineage.summary("pool_index")["usable"] if selection else 0
    return StepResult(summary, data_version=version, units=ranked)


def _select(work: StepInputs, recipe: ResolvedRecipe, task: str, *, explained: bool) -> Selection | None:
    from less_assets.method.selection.selection import select_all

    if not recipe.traits.chooses_rows:
        return None
    pool = Pool(work)
    if not recipe.traits.has_budget:
        return select_all(pool.shards(tokens=False))
    if explained and recipe.traits.scores is not None:
        _keep_pool_scores(work, scored_pool(work, pool, recipe, task), aggregate_of(recipe))
    return select_rows(work, pool, recipe, task)


def _keep_pool_scores(work: StepInputs, candidates: list[Candidates], aggregate: str) -> None:
    """Store an even sample of the pool's scores, each row's mean or best over its subtasks, for the histogram."""
    parts = []
    for member in candidates:
        for table in member.shards():
            usable = table.filter((pl.col("status") == "ok") & pl.col("canonical"))[member.column]
            best = usable.arr.mean() if aggregate == "mean" else usable.arr.max()
            parts.append(best.cast(pl.Float32))
    scores = pl.concat(parts).drop_nans().sort()
    kept = scores.gather_every(max(1, -(-len(scores) // CHART_SCORES)))
    write_parquet(work.folder, POOL_SCORES, pl.DataFrame({"score": kept}))


def _write_rows(work: StepInputs, ranked: pl.DataFrame) -> int:
    """Store selected rows with their messages and tools, as a table and as JSON lines.

    Memory holds one shard of the pool, or `ROWS_PER_FILE` rows of the selection, with their messages.

    Args:
        work: Reads the pool, and writes.
        ranked: `SELECTION_SCHEMA`, best first.

    Returns:
        How many of them are very short.
    """
    from less_assets.method.data.conversations import for_trainers, is_very_short

    very_short = 0
    with working_folder() as folder:
        parts = _parts_with_messages(work.lineage, ranked, folder)
        with written_file(work.folder.path(SUBSET_JSONL)) as file, file.open("w", encoding="utf-8") as lines:
            for part in parts:
                for row, messages, tools in _told(pl.read_ipc(part)):
                    very_short += is_very_short(messages)
                    lines.write(json.dumps(row | for_trainers(messages, tools), ensure_ascii=False) + "\n")
        write_parquet(work.folder, SUBSET, pl.scan_ipc(parts))
    return very_short


def _parts_with_messages(lineage: Lineage, ranked: pl.DataFrame, folder: Path) -> list[Path]:
    """Files of `ROWS_PER_FILE` rows each, by rank, with messages and tools by id; shards are read once."""
    from less_assets.method.data.examples import POOL_SCHEMA

    files = [folder / f"{number:06d}.arrow" for number in range(max(1, -(-ranked.height // ROWS_PER_FILE)))]
    pieces: dict[Path, list[Path]] = {file: [] for file in files}
    for shard in ranked["shard"].unique(maintain_order=True):
        wanted = ranked.filter(pl.col("shard") == shard).sort("row")
        wanted = wanted.hstack(conversations_of(lineage, shard, wanted["row"]).select("messages", "tools"))
        number = (pl.col("rank") - 1) // ROWS_PER_FILE
        for (file_number,), piece in wanted.group_by(number):
            own = pieces[files[int(file_number)]]
            own.append(folder / f"{file_number}-{len(own)}.arrow")
            piece.write_ipc(own[-1])
    schema = {**ranked.schema, "messages": POOL_SCHEMA["messages"], "tools": POOL_SCHEMA["tools"]}
    for file, own in pieces.items():
        parts = [pl.DataFrame(schema=schema), *(pl.read_ipc(path) for path in own)]
        pl.concat(parts).sort("rank").write_ipc(file)
        for path in own:
            path.unlink()
    return files


def _told(rows: pl.DataFrame) -> Iterator[tuple[dict[str, Any], list[Any], str | None]]:
    """What a line says of each row, its messages, and its tools."""
    named = rows.select("example_id", "source", "rank", "score").iter_rows(named=True)
    said = rows.select("messages", "tools").iter_rows()
    return ((row, messages, tools) for row, (messages, tools) in zip(named, said, strict=True))


def describe_scores(stored: Stored) -> Shown:
    """How the scores of each form are distributed."""
    from less_assets.report import charts

    summary: Any = stored.manifest.summary
    files = sorted(name for name in stored.manifest.files if name.endswith(".parquet"))
    columns = [f"{form}.mean_cosine" for form in summary["forms"]]
    parts = [stored.table(file, columns) for file in files]
    values: dict[str, Any] = {}
    for column in columns:
        scores = pl.concat([part[column].drop_nulls().arr.max() for part in parts])
        if len(scores):
            values[f"highest/{column}"], values[f"median/{column}"] = scores.max(), scores.median()
            kept = scores.sort().gather_every(max(1, -(-len(scores) // CHART_SCORES)))
            drawn = charts.score_histogram(kept)
            values[f"scores/{column}"] = Picture(drawn, f"best score of each row, {column}")
    return Shown(values, summary["rows"], stored.table(files[0]).schema if files else None)


def describe_subset(stored: Stored) -> Shown:
    """The best rows, what the subset is made of against the pool, and where the cut lies."""
    from less_assets.report import charts

    stored_rows, files = stored.scan(SUBSET), stored.manifest.files
    columns = stored_rows.collect_schema()
    table = stored.table(SUBSET, [name for name in columns if name not in ("messages", "tools")])
    values: dict[str, Any] = {"rows": table.height}
    if table.is_empty():
        return Shown(values, 0)
    if table["score"].null_count() < table.height:
        values["lowest_score"], values["mean_score"] = table["score"].min(), table["score"].mean()
    shown = ("rank", "score", "messages", "subtask", "source", "example_id")
    top = stored_rows.head(TABLE_ROWS).select(shown).collect()
    recipe, task = split(stored.partition)
    project, best = stored.lineage.project, top["example_id"][0]
    has_report = recipe in project.recipe_keys and chooses_rows(project, recipe)  # a pilot has none
    if has_report and task not in project.folds:
        values["explain_top_row"] = explain_command(project, task, best)
        values["open_report"] = ReportLink(stored.partition)
        values["open_top_row"] = ReportLink(stored.partition, best)
        values["open_top_rows"] = ReportLinks(stored.partition, top)
    values["top_rows"] = Table(top, examples=True)
    sources = dict(table["source"].value_counts().iter_rows())
    pool: Any = stored.manifest.summary["pool_sources"]
    values["shares_by_source"] = Picture(charts.share_comparison(sources, pool), "share of each source")
    subtasks = dict(table["subtask"].drop_nulls().value_counts().iter_rows())
    if len(subtasks) > 1:
        values["shares_by_subtask"] = Picture(charts.share_bars(subtasks), "share of each subtask")
    if PASSED_OVER in files:
        values["passed_over"] = Table(stored.table(PASSED_OVER).head(TABLE_ROWS))
    if POOL_SCORES in files:
        cut: Any = table["score"].min()
        drawn = charts.score_histogram(
            stored.table(POOL_SCORES)["score"].to_numpy(), float(cut), all_above=_all_above(stored)
        )
        values["scores"] = Picture(drawn, "scores of the pool and the cut")
    return Shown(values, table.height, columns)


def explain_command(project: Project, task: str, example_id: str) -> Command:
    """What says in a terminal, in any folder, why a row scores as it does."""
    return Command(f"less-assets explain {task} {example_id} --project {shlex.quote(str(project.path))}")


def _all_above(stored: Stored) -> float | None:
    """The best score that a row can have and not be selected; None: the cut."""
    if PASSED_OVER in stored.manifest.files:
        return math.inf
    aggregate = selecting_recipe(stored.lineage, *split(stored.partition)).aggregate
    if aggregate == "match":
        return math.inf
    if aggregate != "round_robin":
        return None
    cuts: Any = stored.manifest.summary["cut_scores"]
    return max((score for part in cuts.values() for score in part.values()), default=math.inf)


def score_work(workload: Workload, due: Sequence[str]) -> Amount:
    """Products of one pass over the datastore, and the bytes of the tables."""
    rows, forms = workload.pool_rows, len(workload.project.gradients.forms)
    passes = rows * forms * len(workload.project.checkpoints)
    subtasks = sum(workload.target_sizes[str(task)][2] for task in due)
    columns = 2 * forms * (len(workload.project.checkpoints) + 1)  # two subtask rules; each checkpoint, and their sum
    return Amount(
        # Tasks that are due together share one pass over the datastore.
        units={"influence_scores": passes},
        bytes=rows * (4.0 * columns * subtasks + 24 * len(due)),
    )


def selection_work(workload: Workload, due: Sequence[str], asset: str = "selected_subset") -> Amount:
    """Rows that are ranked, and the bytes of the subsets."""
    samples = list(workload.samples.values())
    row = 2 * sum(sample.stored_bytes for sample in samples) / max(1, len(samples))  # Parquet, and JSON lines
    stored = sum(workload.selected_rows(*split(key), asset) * row for key in due)
    return Amount(units={asset: workload.pool_rows * len(due)}, bytes=stored)


def _recipe(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.recipe_settings(keys["recipe"])


def _tokenizer(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    """How long rows are depends on the tokenizer."""
    project = lineage.project
    return {"tokenizer": project.tokenizer_settings()} if project.counts_tokens(keys["recipe"]) else {}


def _tokenizer_files(lineage: Lineage, keys: Keys) -> Versions:
    """How long rows are depends on the tokenizer's files, too.

    No input stands for them: Dagster cannot have some partitions read an unpartitioned asset and others not. It makes
    `base_model` first in any case, since `pool_index` needs it.
    """
    return lineage.version("base_model") if lineage.project.counts_tokens(keys["recipe"]) else {}


def _reads_influence(project: Project, recipe: str) -> bool:
    return project.reads_scores(recipe)


def _reads_falls(project: Project, recipe: str) -> bool:
    return any(project.recipe(other).scores == "tuning" for other in project.scored_by(recipe))


def _matches_targets(project: Project, recipe: str) -> bool:
    return project.matches_targets(recipe)


def _scored_by(project: Project, recipe: str) -> list[str]:
    return project.scored_by(recipe)


def _rehearsal_seconds(lineage: Lineage, keys: Keys) -> float | None:
    project, key = lineage.project, keys["recipe"]
    if not project.recipe(key).traits.chooses_rows:
        return 0
    return seconds_to_rank(lineage, key, project.candidates(key).values() or [project.recipe(key)])


def seconds_to_rank(lineage: Lineage, key: str, recipes: Iterable[ResolvedRecipe]) -> float | None:
    """About how long a selection by one of some recipes takes; None for too long.

    Encoding rows to count their tokens, and reading features to find near-duplicates, would take too long.
    """
    if lineage.project.counts_tokens(key) or any(recipe.near_duplicates is not None for recipe in recipes):
        return None
    return RANKING_SECONDS * lineage.pool_files.rows


SCORES = (
    Input("influence_scores", read_by=_reads_influence),
    Input("exact_scores", of_recipes=_scored_by),
    *(Input(name, of_recipes=_scored_by) for kind, name in SCORE_ASSETS.items() if kind != "tuning"),
    Input("target_tuned_scores", read_by=_reads_falls),
    Input("target_examples", read_by=_matches_targets),
)
"""What recipes and pilots rank by."""

ASSETS = (
    Asset(
        name="influence_scores",
        group="scores",
        kinds=frozenset({"numpy", "parquet"}),
        description="Influence of every pool row on every subtask, per direction form, subtask rule and checkpoint.",
        axes=("task",),
        inputs=(
            Input("pool_index"),
            Input("kept_rows"),
            Input("gradient_datastore"),
            Input("target_gradients"),
        ),
        folder="selection/{task}/influence",
        compute_together=score_pool,
        describe=describe_scores,
        checks=(sketch_is_faithful, influence_is_real),
        in_ranges=True,
        loads_model=True,  # for its checks
        spread=True,
        amount=score_work,
        columns_from={
            "pool_index": ROW_COLUMNS | {"shard": ["shard"], "row": ["row"]},
            "target_gradients": {"{form}.{rule}": ["features", "subtask"], "{form}.{rule}.{checkpoint}": ["features"]},
        },
    ),
    Asset(
        name="recipe_settings",
        group="selection",
        kinds=frozenset({"yaml", "json"}),
        description="The recipe with every default filled in; changes downstream only if it really changed.",
        axes=("recipe",),
        folder="recipes/{recipe}",
        settings=_recipe,
        compute=resolve_recipe,
        in_ranges=True,
        automatic=True,
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: 0,
    ),
    Asset(
        name="selected_subset",
        group="selection",
        kinds=frozenset({"polars", "parquet"}),
        description="The rows that a recipe selects for a task, ranked, with their messages: Parquet and JSON lines.",
        axes=("recipe", "task"),
        inputs=(
            Input("recipe_settings"),
            Input("pool_index"),
            Input("excluded_rows"),
            *SCORES,
            Input("tournament_results"),
        ),
        folder="selection/{task}/recipes/{recipe}",
        settings=_tokenizer,
        outside=_tokenizer_files,
        compute=select_subset,
        describe=describe_subset,
        checks=(no_subtask_dominates, not_only_very_short_rows, prefilter_loses_little),
        leads_to_reports=True,
        in_ranges=True,
        amount=selection_work,
        speed=Guess(seconds=RANKING_SECONDS),
        versioned_by_content=True,
        rehearsal_seconds=_rehearsal_seconds,
        columns_from={
            "pool_index": ROW_COLUMNS | {"shard": ["shard"], "row": ["row"]},
            "influence_scores": {
                "score": ["{form}.{rule}"],
                "rank": ["{form}.{rule}"],
                "subtask": ["{form}.{rule}"],
                "loss_tokens": ["loss_tokens"],
            },
            "exact_scores": {"score": ["exact"], "rank": ["exact"], "subtask": ["exact"]},
        },
    ),
)
