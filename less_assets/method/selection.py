"""From scores to a ranked subset: budgets, aggregation over subtasks, ties, turns between tasks.

Belongs here: every strategy's ranking, streamed shard by shard. Not here: where scores come from (influence.py,
baselines.py) and the rows' text, which the asset joins by id.

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

from less_assets.errors import PoolFormatError, ProjectFileError

AGGREGATES = ("max", "mean", "round_robin")

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
            `no_score` rows whose score is not a number.
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
    """A ranked subset (`SELECTION_SCHEMA`) and its summary."""

    table: pl.DataFrame
    summary: SelectionSummary


def select_by_score(candidates: Sequence[Candidates], budget: Budget, aggregate: str) -> Selection:
    """Take the rows with the highest influence.

    Within a task, `max` ranks by the best subtask's score and `mean` by the mean over subtasks; with `round_robin` the
    subtasks, in their order, take their best remaining row in turn. Several tasks take turns in the same way, in the
    order given. Equal scores rank by example id.

    Args:
        candidates: One per task; all score the same pool.
        budget: How much.
        aggregate: One of `AGGREGATES`.

    Raises:
        PoolFormatError: No row of the pool is usable.
        ProjectFileError: Not even the best row fits a token budget.
        ValueError: The aggregate or a column does not fit.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"unknown aggregate {aggregate!r}; known are {list(AGGREGATES)}")
    usable, removed = _count(candidates[0].shards)
    limit = _Limit.of(budget, usable)
    members, unscored = [], 0
    for member in candidates:
        queues = [_Queue(limit) for _ in (member.labels if aggregate == "round_robin" else "1")]
        lost = 0
        for frame in member.shards():
            frame = _usable(frame)
            scores = _score_matrix(frame, member)
            scored = ~np.isnan(scores).any(axis=1)
            lost += int((~scored).sum())
            frame, scores = frame.filter(scored), scores[scored]
            if not len(frame):
                continue
            if aggregate == "round_robin":
                for place, queue in enumerate(queues):
                    queue.offer(frame, scores[:, place], member.labels[place], member.task)
            else:
                best = scores.max(axis=1) if aggregate == "max" else scores.mean(axis=1, dtype=np.float64)
                winners = np.asarray(member.labels)[scores.argmax(axis=1)]
                queues[0].offer(frame, best.astype(np.float32), winners, member.task)
        members.append([queue.ranked() for queue in queues])
        unscored = max(unscored, lost)
    if unscored:
        removed["no_score"] = unscored
    return _selection(_take_in_turn(members, limit), usable - unscored, removed)


def select_at_random(shards: Shards, budget: Budget, seed: int) -> Selection:
    """Take rows in the order of a keyed hash of their ids: uniform, and an appended shard moves no row past another.

    Args:
        shards: As in `Candidates`, without scores.
        budget: How much.
        seed: Any integer.
    """
    usable, removed = _count(shards)
    limit = _Limit.of(budget, usable)
    queue = _Queue(limit)
    for frame in shards():
        frame = _usable(frame)
        keys = [_random_key(example_id, seed) for example_id in frame["example_id"].to_list()]
        queue.offer(frame, np.asarray(keys, dtype=np.uint64), None, None)
    return _selection(_take_in_turn([[queue.ranked()]], limit), usable, removed)


def select_all(shards: Shards) -> Selection:
    """Take every usable row once, in the order of the pool."""
    usable, removed = _count(shards)
    frames = [_with_key(_usable(frame), None, None, None) for frame in shards()]
    return _selection(pl.concat(frames), usable, removed)


def _random_key(example_id: str, seed: int) -> int:
    digest = hashlib.blake2b(example_id.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big")


@dataclass(frozen=True)
class _Limit:
    """A budget in rows or in tokens; the other is None."""

    rows: int | None
    tokens: int | None

    @classmethod
    def of(cls, budget: Budget, usable: int) -> "_Limit":
        rows = budget.rows_of(usable)
        return cls(rows, int(budget.amount) if rows is None else None)


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


def _score_matrix(frame: pl.DataFrame, member: Candidates) -> np.ndarray:
    """Scores as float32 (n, J); null rows are NaN."""
    column = frame[member.column]
    width = column.dtype.shape[0] if isinstance(column.dtype, pl.Array) else 1
    if width != len(member.labels):
        raise ValueError(f"column {member.column} holds {width} scores a row for {len(member.labels)} subtasks")
    scores = np.full((len(frame), width), np.nan, dtype=np.float32)
    present = column.is_not_null().to_numpy()
    scores[present] = column.drop_nulls().to_numpy().reshape(-1, width)
    return scores + np.float32(0)  # -0.0 and 0.0 are equal, and equal scores rank by id


def _with_key(
    frame: pl.DataFrame, key: np.ndarray | None, subtask: str | np.ndarray | None, task: str | None
) -> pl.DataFrame:
    """The columns that a selection needs, and `key`, by which a queue ranks."""
    scores = key if key is not None and key.dtype == np.float32 else None
    tokens = pl.col("loss_tokens") if "loss_tokens" in frame.columns else pl.lit(None)
    return frame.select(
        pl.col("example_id", "source", "shard"),
        pl.col("row").cast(pl.Int64),
        (pl.lit(None) if scores is None else pl.Series(scores)).cast(pl.Float32).alias("score"),
        (pl.Series(subtask, dtype=pl.String) if isinstance(subtask, np.ndarray) else pl.lit(subtask, pl.String)).alias(
            "subtask"
        ),
        pl.lit(task, pl.String).alias("task"),
        tokens.cast(pl.Int32).alias("loss_tokens"),
        (pl.lit(0) if key is None else pl.Series(key)).alias("key"),
    )


class _Queue:
    """The best rows so far in one order, as many as the budget could ever take from it.

    Whatever others take first, a queue never looks beyond its first `limit.rows` rows: by then the budget is spent.
    With tokens, likewise, never beyond the row with which its tokens exceed the budget.
    """

    def __init__(self, limit: _Limit) -> None:
        self._limit = limit
        self._best: list[pl.DataFrame] = []  # the first is ranked and cut, the others wait
        self._waiting = 0
        self._threshold: float | int | None = None  # a row below this key is beyond the budget already

    def offer(self, frame: pl.DataFrame, key: np.ndarray, subtask: str | np.ndarray | None, task: str | None) -> None:
        """Consider rows; `key` is their score (float32) or hash (uint64), highest first."""
        if self._threshold is not None:
            near = key >= self._threshold
            frame, key = frame.filter(near), key[near]
            subtask = subtask[near] if isinstance(subtask, np.ndarray) else subtask
        if not len(frame):
            return
        self._best.append(_with_key(frame, key, subtask, task))
        self._waiting += len(frame)
        if self._waiting > max(len(self._best[0]), 4096):
            self.ranked()

    def ranked(self) -> pl.DataFrame | None:
        """The rows that matter, best first; None if there are none."""
        if not self._best:
            return None
        rows = pl.concat(self._best).sort(["key", "example_id"], descending=[True, False])
        if self._limit.rows is not None:
            kept = rows.head(self._limit.rows)
            full = len(kept) == self._limit.rows
        else:
            if rows["loss_tokens"].has_nulls():
                raise ValueError("a token budget needs the column loss_tokens")
            before = rows["loss_tokens"].cast(pl.Int64).cum_sum() - rows["loss_tokens"]
            kept = rows.filter(before <= self._limit.tokens)
            full = len(kept) < len(rows)
        if full:
            self._threshold = kept["key"][-1]
        self._best, self._waiting = [kept], 0
        return kept


class _Ranking:
    """A ranked queue while rows are taken from it."""

    def __init__(self, rows: pl.DataFrame) -> None:
        self._rows = rows
        self._ids: list[str] = rows["example_id"].to_list()
        self._costs: list[int] = rows["loss_tokens"].fill_null(0).to_list()
        self._next = 0
        self._places: list[int] = []
        self._ranks: list[int] = []

    def best_left(self, taken: set[str]) -> tuple[str, int] | None:
        """Id and loss tokens of the best row that nobody has taken."""
        while self._next < len(self._ids) and self._ids[self._next] in taken:
            self._next += 1
        return (self._ids[self._next], self._costs[self._next]) if self._next < len(self._ids) else None

    def take(self, rank: int) -> None:
        """Take that row as the selection's `rank`-th."""
        self._places.append(self._next)
        self._ranks.append(rank)

    def taken(self) -> pl.DataFrame:
        return self._rows[self._places].with_columns(pl.Series("rank", self._ranks, dtype=pl.Int64))


def _take_in_turn(members: Sequence[Sequence[pl.DataFrame | None]], limit: _Limit) -> pl.DataFrame:
    """Members take a row in turn, each from its queues in turn, always the best that is left, until the budget ends."""
    turns = [[_Ranking(frame) for frame in queues if frame is not None] for queues in members]
    everyone = [ranking for queues in turns for ranking in queues]
    taken: set[str] = set()
    tokens, spent = 0, False
    while not spent and any(turns):
        for queues in turns:
            while queues and not queues[0].best_left(taken):
                queues.pop(0)
            if not queues or not (found := queues[0].best_left(taken)):
                continue
            example_id, cost = found
            tokens += cost
            spent = tokens > limit.tokens if limit.tokens is not None else len(taken) == limit.rows
            if spent:
                break
            taken.add(example_id)
            queues[0].take(len(taken))
            queues.append(queues.pop(0))
    if not taken:
        raise ProjectFileError(
            f"The best row alone has more than {limit.tokens} loss tokens." if tokens else "No row has a score.",
            fix="Raise the recipe's `tokens`." if tokens else "Look at the row statuses of `train_gradients`.",
        )
    return pl.concat([ranking.taken() for ranking in everyone]).sort("rank")


def _selection(rows: pl.DataFrame, usable: int, removed: Counter[str]) -> Selection:
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
    )
