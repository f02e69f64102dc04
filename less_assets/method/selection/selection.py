"""From scores to a selected subset: budgets, what can be selected at all, what a selection says of itself.

Belongs here: every strategy's selection, streamed shard by shard. Not here: how rows rank (ranking.py), where scores
come from (influence.py, baselines.py) and the rows' text, which the asset joins by id.

Memory holds one shard and the best rows so far, never all scores. The result does not depend on how the pool is cut
into shards or in which order they come (but for `select_all`, which keeps the pool's order).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl

from less_assets.errors import PoolFormatError
from less_assets.method.selection.baselines import draw_key, with_gumbel_noise
from less_assets.method.selection.ranking import (
    PASSED_OVER_SCHEMA,
    BestRows,
    Limit,
    Restraints,
    choose,
    queues_of,
    score_matrix,
    with_key,
)

SELECTION_SCHEMA = pl.Schema(
    {
        "rank": pl.Int64,  # 1 is the best
        "example_id": pl.String,
        "source": pl.String,
        "shard": pl.String,
        "row": pl.Int64,  # within the shard
        "score": pl.Float32,  # null where the strategy has none
        "subtask": pl.String,  # the one that the row helps most, or that took it in its turn
        "task": pl.String,  # the member task that took it
        "loss_tokens": pl.Int32,  # null where unknown
    }
)

Shards = Callable[[], Iterable[pl.DataFrame]]


@dataclass(frozen=True)
class Budget:
    """How much to select.

    Attributes:
        kind: `fraction` of the unique usable ids, number of `rows`, or number of loss `tokens` (never exceeded: the
            selection ends before the first row that does not fit).
        amount: 0 < fraction ≤ 1; rows and tokens are at least 1.
    """

    kind: Literal["fraction", "rows", "tokens"]
    amount: float

    def __post_init__(self) -> None:
        highest = 1.0 if self.kind == "fraction" else np.inf
        if not (0 < self.amount <= highest) or (self.kind != "fraction" and self.amount < 1):
            raise ValueError(f"a budget of {self.amount} {self.kind} selects nothing or too much")

    def times(self, factor: float) -> "Budget":
        """The budget of `factor` times as much; a fraction is at most the whole pool."""
        amount = self.amount * factor
        return Budget(self.kind, min(1.0, amount) if self.kind == "fraction" else amount)

    def rows_of(self, usable: int) -> int | None:
        """Number of rows for this many usable ids; None where tokens decide."""
        if self.kind == "tokens":
            return None
        if self.kind == "rows":
            return min(int(self.amount), usable)
        return max(1, int(self.amount * usable + 1e-9))  # the code's int(fraction * n), safe from 0.05 * 20 < 1

    def limit(self, usable: int) -> Limit:
        """Where taking rows ends, for this many usable ids."""
        rows = self.rows_of(usable)
        return Limit(rows, int(self.amount) if rows is None else None)


@dataclass(frozen=True)
class Candidates:
    """The scored pool for one task.

    Attributes:
        task: Name of the task.
        column: Score column, `Array(Float32, J)`, or a plain float column where J is 1.
        labels: The J subtasks in the column's order.
        shards: Called for every pass; yields score tables with example_id, source, shard, row, status ("ok" or a
            reason), canonical (bool: the one copy of its id that counts), the score column and, for token budgets,
            loss_tokens.
    """

    task: str
    column: str
    labels: tuple[str, ...]
    shards: Shards


@dataclass(frozen=True)
class SelectionSummary:
    """What was selected and what never could be.

    Attributes:
        rows: Selected rows.
        usable: Unique ids that could have been selected.
        loss_tokens: Loss tokens of the selected rows; None where unknown.
        rows_per_source: Source -> selected rows.
        rows_per_subtask: Task -> subtask -> selected rows.
        cut_scores: Task -> subtask -> lowest score among its selected rows.
        removed: Reason -> rows of the pool that could not be selected; `duplicate` are further copies of an id,
            `no_score` rows whose score is not a number, `near_duplicate` and `quota` what was passed over.
    """

    rows: int
    usable: int
    loss_tokens: int | None
    rows_per_source: dict[str, int]
    rows_per_subtask: dict[str, dict[str, int]]
    cut_scores: dict[str, dict[str, float]]
    removed: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """A ranked subset (`SELECTION_SCHEMA`), its summary, and what was passed over (`PASSED_OVER_SCHEMA`), in order."""

    table: pl.DataFrame
    summary: SelectionSummary
    passed_over: pl.DataFrame


def select_by_score(
    candidates: Sequence[Candidates], budget: Budget, aggregate: str, restraints: Restraints | None = None
) -> Selection:
    """Take the rows with the highest influence.

    Within a task, `max` ranks by the best subtask's score and `mean` by the mean over subtasks; with `round_robin` the
    subtasks, in their order, take their best remaining row in turn. Several tasks take turns in the same way, in the
    order given. Equal scores rank by example id.

    Args:
        candidates: One per task; all score the same pool.
        budget: How much.
        aggregate: One of `AGGREGATES`.
        restraints: What to pass over.

    Raises:
        PoolFormatError: No row of the pool is usable.
        ProjectFileError: Not even the best row fits a token budget.
        ValueError: The aggregate or a column does not fit.
    """
    usable, removed = _count(candidates[0].shards)
    unscored = 0

    def best_rows(reach: Limit) -> list[list[BestRows]]:
        nonlocal unscored
        members = []
        for member in candidates:
            orders, lost = _rank(member, aggregate, reach)
            members.append(orders)
            unscored = max(unscored, lost)
        return members

    table, passed_over = choose(best_rows, budget.limit(usable), restraints or Restraints())
    if unscored:
        removed["no_score"] = unscored
    return selection_of(table, usable - unscored, removed, passed_over)


def _rank(member: Candidates, aggregate: str, reach: Limit) -> tuple[list[BestRows], int]:
    """The best rows of a task's pool, in each of its orders; and how many usable rows have no score."""
    queues = queues_of({member.task: [(label, column) for column, label in enumerate(member.labels)]}, aggregate)
    orders = [BestRows(reach) for _ in queues]
    labels = np.asarray(member.labels)
    lost = 0
    for table in member.shards():
        usable = _usable(table)
        scores = _scores(usable, member)
        scored = ~np.isnan(scores).any(axis=1)
        lost += int((~scored).sum())
        usable, scores = usable.filter(scored), scores[scored]
        if not len(usable):
            continue
        for queue, best in zip(queues, orders, strict=True):
            subtask = labels[scores.argmax(axis=1)] if queue.subtask is None else queue.subtask
            best.offer(usable, queue.scores(scores), subtask, member.task)
    return orders, lost


def select_at_random(
    shards: Shards,
    budget: Budget,
    seed: int,
    *,
    stream: str = "",
    log_weights: Callable[[pl.DataFrame], np.ndarray] | None = None,
    restraints: Restraints | None = None,
) -> Selection:
    """Take rows in the order of a keyed hash of their ids: uniform, and an appended shard moves no row past another.

    Args:
        shards: As in `Candidates`, without scores.
        budget: How much.
        seed: Any integer.
        stream: What the draw is for: draws of different streams are independent, also at equal seeds. The warm-up
            draws from the stream without a name.
        log_weights: Log of each row's weight, float (n,), where rows shall not be equally likely.
        restraints: What to pass over.
    """
    usable, removed = _count(shards)

    def best_rows(reach: Limit) -> list[list[BestRows]]:
        best = BestRows(reach)
        for table in shards():
            rows = _usable(table)
            ids = rows["example_id"].to_list()
            if log_weights is None:
                keys = draw_numbers(ids, seed, stream)
            else:
                keys = with_gumbel_noise(log_weights(rows), ids, seed, stream).astype(np.float64)
            best.offer(rows, keys, None, None)
        return [[best]]

    table, passed_over = choose(best_rows, budget.limit(usable), restraints or Restraints())
    return selection_of(table, usable, removed, passed_over)


def select_all(shards: Shards) -> Selection:
    """Take every usable row once, in the order of the pool."""
    usable, removed = _count(shards)
    frames = [with_key(_usable(frame), None, None, None) for frame in shards()]
    return selection_of(pl.concat(frames), usable, removed, pl.DataFrame(schema=PASSED_OVER_SCHEMA))


def draw_numbers(ids: Sequence[str], seed: int, stream: str) -> np.ndarray:
    """A random number for each id, uint64 (n,): a keyed hash, so that it depends on no other id."""
    key = draw_key(seed, stream)
    digests = (hashlib.blake2b(example_id.encode(), digest_size=8, key=key).digest() for example_id in ids)
    return np.asarray([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)


def _count(shards: Shards) -> tuple[int, Counter[str]]:
    """Unique usable ids, and the other rows by reason."""
    usable, removed = 0, Counter[str]()
    for frame in shards():
        ok = frame["status"] == "ok"
        usable += int((ok & frame["canonical"]).sum())
        removed["duplicate"] += int((ok & ~frame["canonical"]).sum())
        removed.update(frame.filter(~ok)["status"].to_list())
    if not usable:
        raise PoolFormatError(
            "No row of the pool can be selected.",
            where=", ".join(f"{reason}: {rows} rows" for reason, rows in removed.items() if rows)
            or "the pool is empty",
            fix="Look at the quarantine table of `instruction_pool`.",
        )
    return usable, +removed


def _usable(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter((pl.col("status") == "ok") & pl.col("canonical"))


def _scores(frame: pl.DataFrame, member: Candidates) -> np.ndarray:
    """Scores as float32 (n, J); null rows are NaN."""
    scores = score_matrix(frame[member.column])
    if (width := scores.shape[1]) != len(member.labels):
        raise ValueError(f"column {member.column} holds {width} scores a row for {len(member.labels)} subtasks")
    return scores


def selection_of(rows: pl.DataFrame, usable: int, removed: Counter[str], passed_over: pl.DataFrame) -> Selection:
    """A selection of rows that are in order already.

    Args:
        rows: Columns of `SELECTION_SCHEMA` but `rank`, best first.
        usable: Unique ids that could have been selected.
        removed: Reason -> other rows of the pool, those passed over not yet counted.
        passed_over: `PASSED_OVER_SCHEMA`.
    """
    removed = removed + Counter(passed_over["reason"].to_list())
    table = rows.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias("rank")).select(
        SELECTION_SCHEMA.names()
    )
    per_subtask: dict[str, dict[str, int]] = {}
    cuts: dict[str, dict[str, float]] = {}
    taken = table.drop_nulls("task").group_by("task", "subtask", maintain_order=True)
    for task, subtask, count, cut in taken.agg(pl.len(), pl.col("score").min()).sort("task", "subtask").iter_rows():
        per_subtask.setdefault(task, {})[subtask] = count
        cuts.setdefault(task, {})[subtask] = cut
    return Selection(
        table,
        SelectionSummary(
            rows=len(table),
            usable=usable,
            loss_tokens=None if table["loss_tokens"].has_nulls() else int(table["loss_tokens"].sum()),
            rows_per_source=dict(table["source"].value_counts().sort("source").iter_rows()),
            rows_per_subtask=per_subtask,
            cut_scores=cuts,
            removed=dict(sorted(removed.items())),
        ),
        passed_over,
    )
