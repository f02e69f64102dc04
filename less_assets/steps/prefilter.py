"""The prefilter: which rows of the pool get gradients, and what of a selection is lost by that.

Belongs here: wiring only; both assets exist only if the project file asks for a prefilter. The scores that it ranks by
are those of recipes (`baselines.py`), the estimate is `method/selection/prefilter.py`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from pydantic import JsonValue

from less_assets.compute.step import StepInputs, StepResult
from less_assets.lineage.lineage import Input, Keys, Lineage
from less_assets.lineage.plan import digest
from less_assets.method.selection.ranking import score_matrix
from less_assets.project.project import Project
from less_assets.project.recipes import PREFILTER, ResolvedRecipe
from less_assets.project.strategies import STRATEGIES
from less_assets.reading.excluded import mark_excluded
from less_assets.reading.files import KEPT, PREFILTER_SAMPLE
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import score_column, scores_of
from less_assets.reading.scores import recipe_queues
from less_assets.reading.shard_features import kept_rows
from less_assets.steps.asset import Asset
from less_assets.steps.ranking import SCORE_ASSETS, Pool, select_by_recipe
from less_assets.steps.shown import one_table
from less_assets.store.tables import read_parquet, scan_parquet, write_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.prefilter import Recall

ROW_SECONDS = 2e-5
"""Ranking a row of the pool, or looking it up, on one two-core machine."""


def keep_for_task(work: StepInputs) -> StepResult:
    """Rank the pool for a task as a recipe of the prefilter's strategy does, and keep the best rows.

    What `exclude` leaves out is kept like other rows: another list changes no gradients.
    """
    recipe = work.project.recipe(PREFILTER)
    selection = select_by_recipe(work, Pool(work, exclude=False), recipe, work.partition)
    kept = selection.table.select("example_id", "shard", "row", "rank", "score")
    write_parquet(work.folder, KEPT, kept)
    unique = work.lineage.summary("pool_index")["unique"]
    summary = {"strategy": recipe.strategy, "rows": unique, "kept": kept.height, "share": kept.height / unique}
    return StepResult(summary, data_version=digest(["kept", *kept["example_id"].to_list()]))


def keep_rows(work: StepInputs) -> StepResult:
    """List the rows of a shard that get gradients: what is kept for any task, and a random sample of the others."""
    from less_assets.method.selection.prefilter import drawn_by_id

    lineage, project, shard = work.lineage, work.project, work.partition
    of_shard = pl.col("shard") == shard
    distinct = PoolIndex(lineage).shard(shard).filter("canonical").select("example_id", "row")
    by_task = [
        scan_parquet(lineage.folder("prefiltered_pool", task), KEPT).filter(of_shard).select("row").collect()["row"]
        for task in project.task_names
    ]
    kept = distinct["row"].is_in(pl.concat(by_task).implode())
    sampled = ~kept & pl.Series(
        drawn_by_id(distinct["example_id"].to_list(), _sampled_share(lineage)), dtype=pl.Boolean
    )
    table = distinct.with_columns(sampled.alias("sampled")).filter(kept | sampled).sort("row")
    write_parquet(work.folder, KEPT, table.select("row", "example_id", "sampled"))
    summary = {"rows": distinct.height, "kept": int(kept.sum()), "sampled": int(sampled.sum())}
    return StepResult(summary, data_version=digest(["kept", [list(row) for row in table.iter_rows()]]))


def _sampled_share(lineage: Lineage) -> float:
    """Chance of a row to be in the sample if it is not kept.

    It does not depend on how many rows all tasks together keep: another task changes only the shards that have rows
    which it keeps.
    """
    prefilter = lineage.project.prefilter
    assert prefilter is not None
    return float(prefilter.sample_rows / ((1 - prefilter.keep) * lineage.summary("pool_index")["unique"]))


def prefilter_counts(lineage: Lineage) -> dict[str, int]:
    """Distinct rows of the pool, those kept for any task, and those sampled of the others."""
    shards = [lineage.summary("kept_rows", shard) for shard in lineage.shards()]
    return {name: sum(shard[name] for shard in shards) for name in ("rows", "kept", "sampled")}


def sampled_rows(lineage: Lineage, shard: str) -> list[int]:
    """Rows of a shard that have gradients only to measure what the prefilter loses; none without a prefilter."""
    kept = kept_rows(lineage, shard)
    return [] if kept is None else kept.filter("sampled")["row"].to_list()


def estimated_recall(lineage: Lineage, recipe: ResolvedRecipe, task: str, selected: pl.DataFrame) -> "Recall | None":
    """How much of a selection the prefilter has left; None where that is not known.

    It is known of recipes that take the rows of the highest influence, as it is stored. Quotas and near-duplicates are
    left out of account.

    Args:
        lineage: Reads the scores of the sample.
        recipe: The recipe.
        task: The task.
        selected: The rows that it selected, with rank, score, task and subtask.
    """
    ranked = selected.drop_nulls("score")
    if lineage.project.prefilter is None or not recipe.ranks_by_influence or recipe.candidates or ranked.is_empty():
        return None
    from less_assets.method.selection.prefilter import estimate_recall  # loads scipy, which others do not need

    counts: dict[str, int] = lineage.summary("influence_scores", task)["prefilter"]
    dropped = counts["rows"] - counts["kept"]
    if dropped and not counts["sampled"]:
        return None
    column = score_column(str(recipe.form), str(recipe.subtask))
    chosen = score_matrix(scores_of(lineage, task, ranked, [column])[column])
    others = np.zeros((0, chosen.shape[1]), dtype=np.float32)
    if dropped:
        sample = mark_excluded(lineage, read_parquet(lineage.folder("influence_scores", task), PREFILTER_SAMPLE))
        others = score_matrix(sample.filter(status="ok")[column])
    queues = recipe_queues(lineage, recipe, task)
    return estimate_recall(chosen, others, queues, dropped=dropped, sampled=counts["sampled"])


def _settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    return lineage.project.recipe_settings(PREFILTER)


def _sample_settings(lineage: Lineage, keys: Keys) -> Mapping[str, JsonValue]:
    prefilter = lineage.project.prefilter
    assert prefilter is not None
    return {"sample_rows": prefilter.sample_rows, "keep": prefilter.keep}


def _is_asked_for(project: Project, recipe: str) -> bool:
    return project.prefilter is not None


def _rehearsal_seconds(lineage: Lineage, keys: Keys) -> float:
    return ROW_SECONDS * lineage.pool_files.rows


ASSETS = (
    Asset(
        name="prefiltered_pool",
        group="pool",
        kinds=frozenset({"polars", "parquet"}),
        description="The rows that the prefilter keeps for a task, best first.",
        axes=("task",),
        inputs=(
            Input("pool_index"),
            *(
                Input(asset, of_prefilter=True)
                for scores, asset in SCORE_ASSETS.items()
                if any(strategy.prefilters for strategy in STRATEGIES.values() if strategy.scores == scores)
            ),
        ),
        folder="prefilter/tasks/{task}",
        settings=_settings,
        needed_by=_is_asked_for,
        of_folds=False,
        compute=keep_for_task,
        describe=one_table(KEPT),
        versioned_by_content=True,
        rehearsal_seconds=_rehearsal_seconds,
        columns_from={"pool_index": {name: [name] for name in ("example_id", "shard", "row")}},
    ),
    Asset(
        name="kept_rows",
        group="pool",
        kinds=frozenset({"polars", "parquet"}),
        description="Rows of one shard that get gradients: kept for any task, or sampled to measure what that loses.",
        axes=("shard",),
        inputs=(Input("pool_index"), Input("prefiltered_pool")),
        folder="prefilter/shards/{shard}",
        settings=_sample_settings,
        needed_by=_is_asked_for,
        compute=keep_rows,
        describe=one_table(KEPT),
        in_ranges=True,
        versioned_by_content=True,
        rehearsal_seconds=lambda lineage, keys: ROW_SECONDS * lineage.pool_files.shard(keys["shard"]).rows,
        columns_from={"pool_index": {name: [name] for name in ("example_id", "row")}},
    ),
)
