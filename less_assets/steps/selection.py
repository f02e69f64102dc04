"""From features to a ranked subset: influence scores per task, the recipe as resolved, the selected rows.

Belongs here: wiring only. Mathematics is `method/influence.py`; which scores a recipe ranks by is `ranking.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
import numpy as np
import polars as pl

from less_assets.compute.models import ModelLoader
from less_assets.lineage.lineage import Lineage, split, subset_folder
from less_assets.lineage.plan import digest
from less_assets.orchestration import ui_metadata as metadata
from less_assets.orchestration.checks import SCORE_CHECKS, SUBSET_CHECKS
from less_assets.orchestration.materialization import StepInputs, StepResult, materialize_range, materialize_together
from less_assets.orchestration.partitions import Axes
from less_assets.project.project import Project, ResolvedRecipe
from less_assets.reading.certificates import judge_selection
from less_assets.reading.rows import conversations_of
from less_assets.steps.gradients import FEATURES, TARGET_FEATURES, check_sketch
from less_assets.steps.pool import EXAMPLES
from less_assets.steps.ranking import (
    Pool,
    aggregate_of,
    draw_rows,
    score_file,
    scored_pool,
    select_by_recipe,
)
from less_assets.store.artifacts import ArtifactFolder, ArtifactStore
from less_assets.store.features import open_features
from less_assets.store.manifest import Manifest
from less_assets.store.tables import read_parquet, write_json, write_parquet

SUBSET = "subset.parquet"
SUBSET_JSONL = "subset.jsonl"
POOL_SCORES = "pool_scores.parquet"
SUBTASKS = "subtasks.json"
PASSED_OVER = "passed_over.parquet"
CHART_SCORES = 20_000
"""Scores kept for the histogram: enough for its bins, small for any pool."""


def build_assets(axes: Axes) -> list[dg.AssetsDefinition]:
    """The assets `influence_scores`, `recipe_settings` and `selected_subset`."""
    readers = [key for key in axes.project.recipe_keys if axes.project.reads_scores(key)]

    @dg.asset(
        group_name="selection",
        kinds={"numpy", "parquet"},
        partitions_def=axes.of("influence_scores"),
        deps=[axes.all_partitions("gradient_datastore"), "target_gradients", "pool_index"],
        pool="gpu",  # for its checks
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
    )
    def influence_scores(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> Iterator[dg.MaterializeResult]:
        """Influence of every pool row on every subtask, per direction form, subtask rule and checkpoint."""
        yield from materialize_together(context, project, store, models, score_pool, describe_scores, SCORE_CHECKS)

    @dg.asset(
        group_name="selection",
        partitions_def=axes.of("recipe_settings"),
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
    )
    def recipe_settings(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> Iterator[dg.MaterializeResult]:
        """The recipe with every default filled in; changes downstream only if it really changed."""
        yield from materialize_range(context, project, store, models, resolve_recipe, metadata.summary)

    scores = [axes.by_task("influence_scores", readers)] if readers else []
    optional = ("exact_scores", "embedding_scores", "text_scores")
    scores += [axes.scores_of_recipes(asset) for asset in optional if axes.of(asset) is not None]
    if matching := [key for key in axes.project.recipe_keys if axes.project.matches_targets(key)]:
        scores.append(axes.by_task("target_examples", matching))

    @dg.asset(
        group_name="selection",
        kinds={"polars", "parquet"},
        partitions_def=axes.of("selected_subset"),
        deps=[axes.by_recipe("recipe_settings"), "pool_index", *scores],
        backfill_policy=dg.BackfillPolicy.single_run(),
        output_required=False,
    )
    def selected_subset(
        context: dg.AssetExecutionContext,
        project: dg.ResourceParam[Project],
        store: dg.ResourceParam[ArtifactStore],
        models: dg.ResourceParam[ModelLoader],
    ) -> Iterator[dg.MaterializeResult]:
        """The rows that a recipe selects for a task, ranked, with their messages: Parquet and JSON lines."""
        keys = {subset_folder(*split(key)): key for key in context.partition_keys}

        def describe(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
            key = keys[manifest.key]
            trust = describe_trust(Lineage(project, store), key, read_parquet(folder, SUBSET))
            takes_turns = project.recipe(split(key)[0]).aggregate == "round_robin"
            return {**describe_subset(folder, manifest, takes_turns=takes_turns), **trust}

        yield from materialize_range(context, project, store, models, select_subset, describe, checks=SUBSET_CHECKS)

    return [influence_scores, recipe_settings, selected_subset]


def score_pool(works: list[StepInputs]) -> list[StepResult]:
    """Score the pool for some tasks: shard by shard, all tasks, checkpoints, forms and subtask rules in one pass."""
    from less_assets.method.selection.influence import normalised_weights, row_statuses, score_shard, score_table

    lineage, project = works[0].lineage, works[0].project
    checkpoints, forms = project.checkpoints, project.gradients.forms
    weights = normalised_weights(
        {name: lineage.summary("warmup_checkpoints", name)["mean_learning_rate"] for name in checkpoints}
    )
    labels: dict[str, list[str]] = {}
    directions: dict[str, dict[tuple[str, str], np.ndarray]] = {name: {} for name in checkpoints}
    for work in works:
        labels[work.partition], found = _directions(lineage, work.partition)
        for name in checkpoints:
            directions[name] |= found[name]
    scored = rows = 0
    progress = works[0].progress(lineage.summary("pool_index")["usable"], f"rows for {len(works)} tasks")
    for shard in lineage.shards():
        features = {
            name: open_features(lineage.folder("train_gradients", f"{name}|{shard}"), FEATURES) for name in checkpoints
        }
        pool = read_parquet(lineage.folder("instruction_pool", shard), EXAMPLES, ["example_id", "source", "status"])
        status = row_statuses(pool["status"].to_list(), {name: reader.status for name, reader in features.items()})
        table = pool.with_columns(
            pl.lit(shard).alias("shard"),
            pl.int_range(pl.len(), dtype=pl.Int64).alias("row"),
            pl.Series("status", status),
            pl.Series("loss_tokens", features[checkpoints[0]].loss_tokens),
        )
        scores = score_shard(features, directions, weights, forms)
        for work in works:
            write_parquet(work.folder, score_file(shard), score_table(table, scores[work.partition]))
        rows, usable = rows + table.height, table.filter(pl.col("status") == "ok").height
        scored += usable
        progress(usable)
    results: list[StepResult] = []
    for work in works:
        own = labels[work.partition]
        write_json(work.folder, SUBTASKS, own)  # type: ignore[arg-type]
        summary = {"rows": rows, "scored": scored, "subtasks": own, "weights": weights, "forms": list(forms)}
        # One pass for all: counted once.
        units = scored * len(forms) * len(checkpoints) if not results else 0
        results.append(StepResult(summary, units=units))
    return results


def _directions(lineage: Lineage, task: str) -> tuple[list[str], dict[str, dict[tuple[str, str], np.ndarray]]]:
    """Target directions of every checkpoint and subtask rule, from the sketched target gradients."""
    from less_assets.method.selection.influence import SUBTASK_RULES, target_directions

    labels: list[str] = []
    directions: dict[str, dict[tuple[str, str], np.ndarray]] = {}
    for checkpoint in lineage.project.checkpoints:
        key = f"{checkpoint}|{task}"
        sketches: dict[str, str] = {}
        for asset, partition in (("gradient_datastore", checkpoint), ("target_gradients", key)):
            check_sketch(sketches, f"{asset} {partition}", lineage.summary(asset, partition)["sketch_digest"])
        table = read_parquet(lineage.folder("target_gradients", key), TARGET_FEATURES)
        features = np.stack(list(table["features"].to_numpy()))
        directions[checkpoint] = {}
        for rule in SUBTASK_RULES:
            labels, directions[checkpoint][task, rule] = target_directions(features, table["subtask"].to_list(), rule)
    return labels, directions


def describe_scores(folder: ArtifactFolder, manifest: Manifest) -> Mapping[str, Any]:
    """Figures, how the scores of each form are distributed, and the columns."""
    from less_assets.report import charts

    files = sorted(name for name in manifest.files if name.endswith(".parquet"))
    shown: dict[str, Any] = {
        **metadata.summary(folder, manifest),
        "dagster/partition_row_count": manifest.summary["rows"],
    }
    columns = [f"{form}.mean_cosine" for form in manifest.summary["forms"]]  # type: ignore[union-attr]
    parts = [read_parquet(folder, name, columns) for name in files]
    for column in columns:
        scores = pl.concat([part[column].drop_nulls().arr.max() for part in parts])
        if len(scores):
            shown[f"highest/{column}"], shown[f"median/{column}"] = float(scores.max()), float(scores.median())  # type: ignore[arg-type]
            kept = scores.sort().gather_every(max(1, -(-len(scores) // CHART_SCORES)))
            shown[f"scores/{column}"] = metadata.picture(
                charts.score_histogram(kept), f"best score of each row, {column}"
            )
    if files:
        shown["dagster/column_schema"] = metadata.column_schema(read_parquet(folder, files[0]))
    return shown


def resolve_recipe(work: StepInputs) -> StepResult:
    """Write the resolved recipe; its version is its content."""
    settings = work.project.recipe_settings(work.partition)
    write_json(work.folder, "recipe.json", settings)
    return StepResult({"recipe": settings}, data_version=digest(settings))


def select_subset(work: StepInputs) -> StepResult:
    """Rank the pool by the recipe, cut at the budget, and add the messages."""
    from less_assets.method.data.conversations import for_trainers, is_very_short

    recipe_key, task = split(work.partition)
    recipe = work.project.recipe(recipe_key)
    selection = _select(work, recipe, task)
    counts: dict[str, Any] = {}
    if selection is None:
        table = pl.DataFrame(schema=_subset_schema())
    else:
        table = _with_messages(work.lineage, selection.table)
        found = selection.summary
        counts = {
            "usable": found.usable,
            "loss_tokens": found.loss_tokens,
            "sources": found.rows_per_source,
            "subtasks": found.rows_per_subtask,
            "cut_scores": found.cut_scores,
            "removed": found.removed,
            "very_short": sum(map(is_very_short, table["messages"])),
        }
        if recipe.quotas or recipe.near_duplicates is not None:
            write_parquet(work.folder, PASSED_OVER, selection.passed_over)
    write_parquet(work.folder, SUBSET, table)
    lines = [
        json.dumps(row | for_trainers(messages, tools), ensure_ascii=False)
        for row, messages, tools in zip(
            table.select("example_id", "source", "rank", "score").iter_rows(named=True),
            table["messages"],
            table["tools"],
            strict=True,
        )
    ]
    work.folder.write_bytes(SUBSET_JSONL, "".join(f"{text}\n" for text in lines).encode())
    pool_sources = work.lineage.summary("pool_index")["sources"] if selection else {}
    summary = {"recipe": recipe.name, "rows": table.height, **counts, "pool_sources": pool_sources}
    version = digest(["selected", *table["example_id"].to_list()])
    return StepResult(summary, data_version=version, units=work.lineage.summary("pool_index")["usable"])


def _select(work: StepInputs, recipe: ResolvedRecipe, task: str) -> Any:
    from less_assets.method.selection import selection

    if recipe.strategy == "none":
        return None
    pool = Pool(work)
    if recipe.strategy == "full":
        return selection.select_all(pool.shards(tokens=False))
    if recipe.strategy in ("random", "length_matched"):
        return draw_rows(work, pool, recipe, task)
    _keep_pool_scores(work, scored_pool(work, pool, recipe, task), aggregate_of(recipe))
    return select_by_recipe(work, pool, recipe, task)


def _keep_pool_scores(work: StepInputs, candidates: list[Any], aggregate: str) -> None:
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


def _subset_schema() -> pl.Schema:
    from less_assets.method.data.examples import POOL_SCHEMA
    from less_assets.method.selection.selection import SELECTION_SCHEMA

    return pl.Schema({**SELECTION_SCHEMA, "messages": POOL_SCHEMA["messages"], "tools": POOL_SCHEMA["tools"]})


def _with_messages(lineage: Lineage, ranked: pl.DataFrame) -> pl.DataFrame:
    """Add each selected row's messages and tools, by id."""
    parts = []
    for shard in ranked["shard"].unique(maintain_order=True):
        table = conversations_of(lineage, shard)
        wanted = ranked.filter(pl.col("shard") == shard)
        parts.append(wanted.join(table.unique("example_id"), on="example_id", how="left"))
    return pl.concat(parts).sort("rank") if parts else pl.DataFrame(schema=_subset_schema())


def describe_trust(lineage: Lineage, key: str, table: pl.DataFrame) -> Mapping[str, Any]:
    """What the certificate of the scores says of the selected rows; nothing where there is none."""
    judged = judge_selection(lineage, key, table)
    if judged is None:
        return {}
    return {
        "certain_rows": judged.certain,
        "borderline_rows": judged.table.height - judged.certain,
        "expected_overlap_with_exact": judged.overlap,
    }


def describe_subset(folder: ArtifactFolder, manifest: Manifest, *, takes_turns: bool) -> Mapping[str, Any]:
    """The best rows, what the subset is made of against the pool, and where the cut lies among the scores.

    Args:
        folder: The subset's files.
        manifest: Its manifest.
        takes_turns: Whether each subtask has a cut of its own.
    """
    from less_assets.report import charts

    table = read_parquet(folder, SUBSET)
    shown: dict[str, Any] = {"rows": table.height, **metadata.summary(folder, manifest)}
    shown["dagster/partition_row_count"] = table.height
    if table.is_empty():
        return shown
    if table["score"].null_count() < table.height:
        shown["lowest_score"], shown["mean_score"] = float(table["score"].min()), float(table["score"].mean())  # type: ignore[arg-type]
    top = table.head(metadata.TABLE_ROWS).select("rank", "score", "messages", "subtask", "source", "example_id")
    shown["top_rows"] = metadata.example_table(top)
    shown["dagster/column_schema"] = metadata.column_schema(table)
    sources = dict(table["source"].value_counts().iter_rows())
    pool: Any = manifest.summary["pool_sources"]
    shown["shares_by_source"] = metadata.picture(charts.share_comparison(sources, pool), "share of each source")
    subtasks = dict(table["subtask"].drop_nulls().value_counts().iter_rows())
    if len(subtasks) > 1:
        shown["shares_by_subtask"] = metadata.picture(charts.share_bars(subtasks), "share of each subtask")
    if PASSED_OVER in manifest.files:
        shown["passed_over"] = metadata.table(read_parquet(folder, PASSED_OVER).head(metadata.TABLE_ROWS))
    if POOL_SCORES in manifest.files:
        scores = read_parquet(folder, POOL_SCORES)["score"].to_numpy()
        cut = float(table["score"].min())  # type: ignore[arg-type]
        drawn = charts.score_histogram(scores, cut, all_above=_all_above(manifest, takes_turns))
        shown["scores"] = metadata.picture(drawn, "scores of the pool and the cut")
    return shown


def _all_above(manifest: Manifest, takes_turns: bool) -> float | None:
    """The best score that a row can have and not be selected; None: the cut."""
    if PASSED_OVER in manifest.files:
        return math.inf
    if not takes_turns:
        return None
    cuts: Any = manifest.summary["cut_scores"]
    return max((score for part in cuts.values() for score in part.values()), default=math.inf)
