"""How a recipe ranked the pool by influence and where it cut: what decides whether a row is in.

Belongs here: reading that back for reports and explanations. Not here: ranking itself (`method/selection/ranking.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl

from less_assets.lineage.lineage import Lineage
from less_assets.method.selection.ranking import Queue, score_matrix
from less_assets.project.recipes import ResolvedRecipe
from less_assets.reading.files import EXACT_COLUMN, SUBSET, score_file
from less_assets.reading.rows import score_column, scores_of
from less_assets.reading.scores import candidates_of, exact_scores_of, recipe_queues
from less_assets.store.tables import read_parquet


class QueueCut(NamedTuple):
    """One of the orders from which rows were taken, and the lowest score that it took."""

    queue: Queue
    cut: float


@dataclass(frozen=True)
class Cuts:
    """A recipe's ranking for a task: queues that take turns, one a subtask (`round_robin`) or one a member task.

    Attributes:
        lineage: Reads the scores.
        task: The task.
        recipe: The recipe, which selects by influence.
        labels: The task's subtasks as its tables name them; columns of every score matrix.
        queues: Those that took at least one row.
        exact: The candidates with exact scores, where these decided; else None.
    """

    lineage: Lineage
    task: str
    recipe: ResolvedRecipe
    labels: list[str]
    queues: list[QueueCut]
    exact: pl.DataFrame | None

    @classmethod
    def of(cls, lineage: Lineage, recipe: ResolvedRecipe, task: str) -> "Cuts":
        """Find the cuts in the selected rows."""
        key = f"{recipe.key}|{task}"
        labels = [str(label) for label in lineage.summary("influence_scores", task)["subtasks"]]
        exact = exact_scores_of(lineage, recipe, task)
        subset = read_parquet(lineage.folder("selected_subset", key), SUBSET, ["score", "subtask", "task"])
        queues = []
        for queue in recipe_queues(lineage, recipe, task):
            taken = queue.taken(subset)
            if taken.height:
                queues.append(QueueCut(queue, float(taken["score"].min())))  # type: ignore[arg-type]
        return cls(lineage, task, recipe, labels, queues, exact)

    @property
    def column(self) -> str:
        """The score column that the recipe reads."""
        return score_column(str(self.recipe.form), str(self.recipe.subtask))

    def margins(self, scores: np.ndarray) -> np.ndarray:
        """How far rows are above the nearest cut.

        Args:
            scores: Influence on every subtask, float32 (n, J).

        Returns:
            float64 (n,): at least 0 for selected rows and for those that were passed over (near-duplicates, quotas),
            negative for others, NaN without a score.
        """
        above = [queue.scores(scores).astype(np.float64) - cut for queue, cut in self.queues]
        return np.max(above, axis=0) if above else np.full(len(scores), np.nan)

    def margins_of(self, rows: pl.DataFrame) -> np.ndarray:
        """The margins of rows given by example_id, shard and row, float64 (n,)."""
        return self.margins(self.scores_of(rows))

    def scores_of(self, rows: pl.DataFrame) -> np.ndarray:
        """Influence of rows on every subtask, exact where that was computed, float32 (n, J)."""
        sketched = score_matrix(scores_of(self.lineage, self.task, rows, [self.column])[self.column])
        if self.exact is None:
            return sketched
        known = self.exact.select("example_id", EXACT_COLUMN)
        rescored = rows.select("example_id").join(known, on="example_id", how="left", maintain_order="left")
        exact = score_matrix(rescored[EXACT_COLUMN])
        return np.where(np.isnan(exact), sketched, exact)

    def pool_margins(self) -> Iterator[np.ndarray]:
        """Margins of all distinct scored rows, shard by shard; of the candidates alone where exact scores decided."""
        members = candidates_of(self.lineage, self.recipe, self.task, exact=self.exact)
        for parts in zip(*(member.shards() for member in members), strict=True):
            columns = [score_matrix(part[member.column]) for part, member in zip(parts, members, strict=True)]
            good = (parts[0]["status"] == "ok").to_numpy() & parts[0]["canonical"].to_numpy()
            margins = self.margins(np.concatenate(columns, axis=1)[good])
            yield margins[np.isfinite(margins)]

    def best_labels(self) -> Iterator[pl.DataFrame]:
        """Per shard of the pool: row, its loss tokens, and the subtask it helps most (null without a score)."""
        folder = self.lineage.folder("influence_scores", self.task)
        names = np.array(self.labels)
        for shard in self.lineage.shards():
            table = read_parquet(folder, score_file(shard), ["row", "loss_tokens", self.column])
            scores = score_matrix(table[self.column])
            empty = np.isnan(scores).any(axis=1)
            best = names[np.where(np.isnan(scores), -np.inf, scores).argmax(axis=1)]
            yield table.select(
                "row",
                pl.col("loss_tokens").alias("tokens"),
                pl.when(pl.Series(empty)).then(None).otherwise(pl.Series(best, dtype=pl.String)).alias("best"),
            )

    def by_label(self) -> dict[str, float]:
        """The lowest selected score for each subtask that has a cut of its own, or for all that share one."""
        cuts = {column: cut for queue, cut in self.queues for column in queue.columns}
        return {self.labels[column]: cuts[column] for column in sorted(cuts)}
