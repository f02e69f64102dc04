"""Rows below the cut are those that a larger budget takes next; the most negative ones are the worst on average."""

import numpy as np
import polars as pl
import pytest

from less_assets.method.selection.around_the_cut import EXPLAINED_SCHEMA, most_negative_rows, rows_below_the_cut
from less_assets.method.selection.ranking import AGGREGATES
from less_assets.method.selection.selection import Budget, Candidates, select_by_score


def candidates(rows: int = 30, tasks: int = 1) -> list[Candidates]:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((tasks, rows, 2)).astype(np.float32)
    scores[:, 4] = np.nan

    def table(task: int) -> pl.DataFrame:
        return pl.DataFrame(
            {
                "example_id": [f"id-{row:02}" for row in range(rows)],
                "source": "s",
                "shard": "s-0",
                "row": pl.Series(range(rows), dtype=pl.Int64),
                "status": ["ok" if row != 7 else "zero_gradient" for row in range(rows)],
                "canonical": [row != 9 for row in range(rows)],
                "loss_tokens": pl.Series([row + 1 for row in range(rows)], dtype=pl.Int32),
                "score": pl.Series(scores[task], dtype=pl.Array(pl.Float32, 2)),
            }
        )

    def shards(task: int):
        return lambda: iter([table(task)[:11], table(task)[11:]])

    return [Candidates(f"task-{task}", "score", ("x", "y"), shards(task)) for task in range(tasks)]


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("budget", [Budget("rows", 6), Budget("tokens", 80)])
def test_rows_below_the_cut_come_next(aggregate, tasks, budget):
    pool = candidates(tasks=tasks)
    selected = select_by_score(pool, budget, aggregate).table["example_id"].to_list()
    below = rows_below_the_cut(pool, selected, aggregate, 4)
    assert below.schema == EXPLAINED_SCHEMA
    more = select_by_score(pool, Budget("rows", len(selected) + 4), aggregate).table
    assert [*selected, *below["example_id"]] == more["example_id"].to_list()
    assert below["rank"].to_list() == list(range(len(selected) + 1, len(selected) + 5))


def test_the_most_negative_rows_are_the_lowest_on_average():
    pool = candidates(tasks=2)
    found = most_negative_rows(pool, ["id-00"], 5)
    assert found.schema == EXPLAINED_SCHEMA
    scores = np.concatenate(
        [np.concatenate([part["score"].to_numpy() for part in member.shards()]) for member in pool], axis=1
    )
    mean = scores.mean(axis=1)
    mean[[0, 7, 9]] = np.nan  # left out, without a score, a copy
    order = [f"id-{row:02}" for row in np.argsort(mean)[:5]]
    assert found["example_id"].to_list() == order
    assert found["score"].max() < 0
    worst = int(order[0][3:])
    label = ["x", "y", "x", "y"][int(scores[worst].argmin())]
    assert found["subtask"][0] == label


def test_positive_rows_are_not_negative_however_few_there_are():
    assert len(most_negative_rows(candidates(), [], 30)) < 27
    assert rows_below_the_cut(candidates(), [], "mean", 0).is_empty()
