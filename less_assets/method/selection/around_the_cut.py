"""Which rows a person looks at besides the selected ones: those that nearly made it, and the most harmful.

Belongs here: finding them in the streamed score tables. Not here: the selection itself (`selection`).
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from less_assets.method.selection.ranking import Restraints, score_matrix
from less_assets.method.selection.selection import SELECTION_SCHEMA, Budget, Candidates, select_by_score

GROUPS = ("selected", "below_cut", "most_negative")

EXPLAINED_SCHEMA = pl.Schema([("group", pl.String), *SELECTION_SCHEMA.items()])
"""Columns of a table of rows to explain; `group` is one of `GROUPS`, `rank` counts within the pool's ranking for the
first two and from the worst row for the third."""


def rows_below_the_cut(
    candidates: Sequence[Candidates],
    selected: Sequence[str],
    aggregate: str,
    count: int,
    restraints: Restraints | None = None,
) -> pl.DataFrame:
    """The rows that a larger budget would have taken next, in that order.

    Args:
        candidates: What the selection was made from.
        selected: Ids of the selected rows.
        aggregate: The recipe's aggregate.
        count: At most so many rows.
        restraints: What the selection passed over.

    Returns:
        `EXPLAINED_SCHEMA`; ranks go on where the selection ends.
    """
    if not count:
        return pl.DataFrame(schema=EXPLAINED_SCHEMA)
    ranked = select_by_score(candidates, Budget("rows", len(selected) + count), aggregate, restraints).table
    below = ranked.filter(~pl.col("example_id").is_in(list(selected))).head(count)
    return below.select(pl.lit("below_cut").alias("group"), *SELECTION_SCHEMA.names())


def most_negative_rows(candidates: Sequence[Candidates], without: Sequence[str], count: int) -> pl.DataFrame:
    """The rows with the lowest influence, on average over the subtasks of all tasks: what training on would undo.

    Args:
        candidates: The scored pool.
        without: Ids of rows to leave out.
        count: At most so many rows; only negative ones count.

    Returns:
        `EXPLAINED_SCHEMA`, the worst first. `score` is the mean over subtasks, `subtask` the one that suffers most.
    """
    known = set(without)
    worst: list[pl.DataFrame] = []
    for tables in zip(*(member.shards() for member in candidates), strict=True):
        scores = np.concatenate(
            [score_matrix(table[member.column]) for table, member in zip(tables, candidates, strict=True)], axis=1
        )
        labels = np.array([(member.task, label) for member in candidates for label in member.labels])
        mean = np.where(np.isnan(scores).any(axis=1), np.nan, scores.mean(axis=1, dtype=np.float64))
        lowest = labels[np.where(np.isnan(scores), np.inf, scores).argmin(axis=1)]
        frame = tables[0].with_columns(
            pl.Series("score", mean.astype(np.float32)),
            pl.Series("subtask", lowest[:, 1], pl.String),
            pl.Series("task", lowest[:, 0], pl.String),
        )
        usable = (pl.col("status") == "ok") & pl.col("canonical") & (pl.col("score") < 0)
        frame = frame.filter(usable & pl.col("score").is_not_nan() & ~pl.col("example_id").is_in(list(known)))
        worst = [pl.concat([*worst, frame.select("example_id", "source", *_PLACES)]).sort("score", "example_id")]
        worst = [worst[0].head(count)]
    if not worst:
        return pl.DataFrame(schema=EXPLAINED_SCHEMA)
    rows = worst[0].with_columns(
        pl.lit("most_negative").alias("group"), pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("rank")
    )
    return rows.select(EXPLAINED_SCHEMA.names()).cast(EXPLAINED_SCHEMA)


_PLACES = ["shard", "row", "score", "subtask", "task", "loss_tokens"]
