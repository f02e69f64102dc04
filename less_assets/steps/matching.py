"""Selections by `aggregate: match`: the best rows by influence as candidates, their sketches folded, the greedy choice.

Belongs here: wiring only. The choice is `method/selection/matching.py`.
"""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from less_assets.compute.step import StepInputs
from less_assets.errors import ProjectFileError
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.rows import checkpoint_weights
from less_assets.reading.shard_features import vectors_of_rows

if TYPE_CHECKING:
    from less_assets.method.selection.selection import Budget, Candidates, Selection


def select_by_matching(
    work: StepInputs, recipe: ResolvedRecipe, scored: "list[Candidates]", budget: "Budget"
) -> "Selection":
    """The rows whose directions together point where the targets' mean direction does.

    A row's score is its influence, mean over subtasks (and over the members of a group); the subtask it is listed under
    is the one that it helps most.

    Args:
        work: Reads features.
        recipe: The recipe, with its quotas.
        scored: The pool by influence, once for each member of a group.
        budget: How much.

    Raises:
        ProjectFileError: Not even the best row fits a token budget, or the quotas allow none.
    """
    from less_assets.method.selection.matching import REACH, Limits, match
    from less_assets.method.selection.ranking import PASSED_OVER_SCHEMA
    from less_assets.method.selection.selection import select_by_score, selection_of

    reaching = [select_by_score(scored, budget.times(REACH), order) for order in ("mean", "round_robin")]
    summary = reaching[0].summary
    rows = _candidates(scored, set(pl.concat([subset.table["example_id"] for subset in reaching])))
    limit = budget.rows_of(summary.usable)
    in_tokens = limit is None
    whole = int(budget.amount) if limit is None else limit
    costs = rows["loss_tokens"].to_numpy().astype(np.int64) if in_tokens else np.ones(rows.height, dtype=np.int64)
    quotas = {source: int(share * whole + 1e-9) for source, share in recipe.quotas.items()}
    limits = Limits(costs, whole, rows["source"].to_list(), quotas)
    matched = match(_vectors(work, recipe, rows), rows["score"].to_numpy(), limits)
    if not matched.chosen:
        raise ProjectFileError(
            "No row is left: the quotas allow none."
            if matched.passed_over
            else f"The best row alone has more than {whole} loss tokens.",
            fix="Raise the recipe's `quotas`." if matched.passed_over else "Raise the recipe's `tokens`.",
        )
    passed_over = rows[matched.passed_over].with_columns(
        pl.lit("quota").alias("reason"), pl.lit(None).alias("kept"), pl.lit(None).alias("similarity")
    )
    return selection_of(
        rows[matched.chosen],
        summary.usable,
        Counter(summary.removed),
        passed_over.select(PASSED_OVER_SCHEMA.names()).cast(dict(PASSED_OVER_SCHEMA)),  # type: ignore[arg-type]
    )


def _candidates(scored: "list[Candidates]", wanted: set[str]) -> pl.DataFrame:
    """Rows by id with what a selection lists of them, sorted by shard and row."""
    from less_assets.method.selection.selection import SELECTION_SCHEMA

    labels = np.array([(member.task, label) for member in scored for label in member.labels])
    # Members of a group count alike, however many subtasks they have.
    weights = np.concatenate([np.full(len(member.labels), 1 / len(member.labels) / len(scored)) for member in scored])
    parts = []
    for tables in zip(*(member.shards() for member in scored), strict=True):
        usable = (pl.col("status") == "ok") & pl.col("canonical") & pl.col("example_id").is_in(list(wanted))
        kept = [table.filter(usable) for table in tables]
        scores = np.concatenate(
            [
                table[member.column].to_numpy().reshape(table.height, len(member.labels))
                for table, member in zip(kept, scored, strict=True)
            ],
            axis=1,
        )
        best = labels[scores.argmax(axis=1)] if len(scores) else labels[:0]
        parts.append(
            kept[0].with_columns(
                pl.Series("score", scores.astype(np.float64) @ weights, pl.Float32),
                pl.Series("task", best[:, 0], pl.String),
                pl.Series("subtask", best[:, 1], pl.String),
            )
        )
    names = [name for name in SELECTION_SCHEMA.names() if name != "rank"]
    # Equal gains rank by row number, so that the choice does not depend on how the pool is cut.
    return pl.concat(parts).select(names).sort("example_id")


def _vectors(work: StepInputs, recipe: ResolvedRecipe, rows: pl.DataFrame) -> np.ndarray:
    """Folded directions of rows, float32 (n, d), in their order."""
    from less_assets.method.selection.matching import vector_dimension

    weights = checkpoint_weights(work.lineage)
    dimension = vector_dimension(rows.height, len(weights))
    progress = work.progress(rows.height, "candidates")
    vectors: np.ndarray | None = None
    for (shard,), part in rows.with_row_index("place").sort("shard", "row").group_by("shard", maintain_order=True):
        stored = vectors_of_rows(work.lineage, weights, str(recipe.form), str(shard), part["row"].to_numpy(), dimension)
        if vectors is None:
            vectors = np.empty((rows.height, stored.shape[1]), dtype=np.float32)
        vectors[part["place"].to_numpy()] = stored
        progress(part.height)
    assert vectors is not None
    return vectors
