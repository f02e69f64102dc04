"""Influence scores as a recipe ranks by them: the tasks that take rows, their subtasks, the scored pool.

Belongs here: reading stored influence for `method/selection`, shard by shard, for whoever selects or explains. Not
here: making scores (`steps/`), the cut that a selection left (`selection_cut.py`).
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.method.selection.ranking import Queue, queues_of
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.excluded import mark_excluded
from less_assets.reading.files import EXACT, EXACT_COLUMN, score_file
from less_assets.reading.pool_index import PoolIndex
from less_assets.reading.rows import score_column
from less_assets.store.tables import read_parquet

if TYPE_CHECKING:
    from less_assets.method.selection.selection import Candidates


def subtasks_by_member(lineage: Lineage, task: str) -> dict[str, list[tuple[str, int]]]:
    """The tasks that take rows in turn, each with its subtasks and their columns in the task's score arrays.

    They are the task itself or, of a group (whose labels are `member/subtask`), its members.
    """
    columns = [
        (str(label), column) for column, label in enumerate(lineage.summary("influence_scores", task)["subtasks"])
    ]
    if lineage.project.task(task).members is None:
        return {task: columns}
    return {
        member.name: [
            (label.removeprefix(f"{member.name}/"), column)
            for label, column in columns
            if label.startswith(f"{member.name}/")
        ]
        for member in lineage.project.member_tasks(task)
    }


def recipe_queues(lineage: Lineage, recipe: ResolvedRecipe, task: str) -> list[Queue]:
    """The orders in which a recipe ranks the pool for a task, or for the members of a group."""
    return queues_of(subtasks_by_member(lineage, task), str(recipe.aggregate))


def exact_scores_of(lineage: Lineage, recipe: ResolvedRecipe, task: str) -> pl.DataFrame | None:
    """A recipe's candidates with exact scores (`EXACT`); None if it ranks by the stored ones."""
    if recipe.candidates is None:
        return None
    return read_parquet(lineage.folder("exact_scores", f"{recipe.key}|{task}"), EXACT)


def candidates_of(
    lineage: Lineage, recipe: ResolvedRecipe, task: str, exact: pl.DataFrame | None = None
) -> "list[Candidates]":
    """The pool scored by influence: once for a task, once for each member of a group.

    Args:
        lineage: Reads the scores.
        recipe: Says which of the scores.
        task: The task or group.
        exact: Rows with exact scores, instead of the whole pool with sketched ones.
    """
    from less_assets.method.selection.selection import Candidates

    members = subtasks_by_member(lineage, task)
    width = sum(map(len, members.values()))
    folder = lineage.folder("influence_scores", task)
    column = score_column(str(recipe.form), str(recipe.subtask)) if exact is None else EXACT_COLUMN
    index = PoolIndex(lineage)

    def tables() -> Iterator[pl.DataFrame]:
        if exact is not None:
            yield exact
            return
        columns = ["example_id", "source", "shard", "row", "status", "loss_tokens", column]
        for shard in lineage.shards():
            table = read_parquet(folder, score_file(shard), columns)
            yield (
                mark_excluded(lineage, table)
                .join(index.shard(shard, ["row", "canonical"]), on="row", how="left")
                .with_columns(pl.col("canonical").fill_null(False))
            )

    def shards(subtasks: list[tuple[str, int]]) -> Callable[[], Iterator[pl.DataFrame]]:
        def read() -> Iterator[pl.DataFrame]:
            for table in tables():
                if len(subtasks) < width:
                    part = pl.concat_arr(pl.col(column).arr.get(index) for _, index in subtasks)
                    table = table.with_columns(pl.when(pl.col(column).is_not_null()).then(part).alias(column))
                yield table

        return read

    return [
        Candidates(member, column, tuple(label for label, _ in subtasks), shards(subtasks))
        for member, subtasks in members.items()
    ]
