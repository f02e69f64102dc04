"""How scores rank the pool: the orders of tasks and subtasks, and the turns in which rows are taken from them.

Belongs here: the one rule by which every selection, certificate and explanation ranks rows. Not here: budgets and what
a selection counts (selection.py), and where scores come from (influence.py, baselines.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import polars as pl

from less_assets.errors import ProjectFileError

AGGREGATES = ("max", "mean", "round_robin")

PASSED_OVER_SCHEMA = pl.Schema(
    {
        "example_id": pl.String,
        "source": pl.String,
        "shard": pl.String,
        "row": pl.Int64,  # within the shard
        "score": pl.Float32,
        "subtask": pl.String,  # the one whose turn it was
        "task": pl.String,
        "reason": pl.String,  # near_duplicate or quota
        "kept": pl.String,  # the selected row that it is a near-duplicate of
        "similarity": pl.Float32,  # its cosine with that row
    }
)

Vectors = Callable[[pl.DataFrame], np.ndarray]


def score_matrix(column: pl.Series) -> np.ndarray:
    """A score column as float32 (n, J); null rows are NaN.

    Args:
        column: `Array(Float32, J)`, or plain floats where J is 1.
    """
    width = column.dtype.shape[0] if isinstance(column.dtype, pl.Array) else 1
    scores = np.full((len(column), width), np.nan, dtype=np.float32)
    scores[column.is_not_null().to_numpy()] = column.drop_nulls().to_numpy().reshape(-1, width)
    return scores


# ---- orders ----


@dataclass(frozen=True)
class Queue:
    """One order in which a recipe ranks the pool: that of a task or, with `round_robin`, of a subtask.

    Attributes:
        task: The task that takes rows in this order.
        subtask: The subtask, where each has an order of its own.
        columns: Columns of the score arrays that count.
        aggregate: `max` or `mean` over these columns.
    """

    task: str
    subtask: str | None
    columns: tuple[int, ...]
    aggregate: str

    def scores(self, array: np.ndarray) -> np.ndarray:
        """Scores float32 (n,) by which this order ranks, from the scores (n, J) per subtask; NaN where one is NaN."""
        counted = np.asarray(array)[:, list(self.columns)]
        best: np.ndarray = counted.max(axis=1) if self.aggregate == "max" else counted.mean(axis=1, dtype=np.float64)
        best = best.astype(np.float32)
        best += 0  # -0.0 and 0.0 are equal, and equal scores rank by id
        return best

    def taken(self, selected: pl.DataFrame) -> pl.DataFrame:
        """The rows of a selection (columns task and subtask) that were taken in this order."""
        mine = selected.filter(pl.col("task") == self.task)
        return mine if self.subtask is None else mine.filter(pl.col("subtask") == self.subtask)


def queues_of(tasks: Mapping[str, Sequence[tuple[str, int]]], aggregate: str) -> list[Queue]:
    """The orders in which a recipe ranks the pool.

    Args:
        tasks: Task (or member of a group) -> its subtasks, each with its column in the score arrays.
        aggregate: One of `AGGREGATES`.

    Raises:
        ValueError: The aggregate is unknown.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"unknown aggregate {aggregate!r}; known are {list(AGGREGATES)}")
    if aggregate == "round_robin":
        return [Queue(task, label, (column,), "max") for task, parts in tasks.items() for label, column in parts]
    return [Queue(task, None, tuple(column for _, column in parts), aggregate) for task, parts in tasks.items()]


# ---- the best rows of an order ----


@dataclass(frozen=True)
class Limit:
    """A budget in rows or in tokens; the other is None."""

    rows: int | None
    tokens: int | None

    def doubled(self) -> "Limit":
        """Twice as much."""
        return Limit(None if self.rows is None else 2 * self.rows, None if self.tokens is None else 2 * self.tokens)


class BestRows:
    """The best rows so far in one order, as many as the budget could ever take from it.

    Whatever others take first, nobody looks beyond an order's first `limit.rows` rows: by then the budget is spent.
    With tokens, likewise, never beyond the row with which its tokens exceed the budget. Where rows are passed over that
    may not be enough: then the best rows are gathered again, twice as many (`choose`).

    Attributes:
        cut: Whether there were more rows than it kept.
    """

    def __init__(self, limit: Limit) -> None:
        self._limit = limit
        self.cut = False
        self._best: list[pl.DataFrame] = []  # the first is ranked and cut, the others wait
        self._waiting = 0
        self._threshold: float | int | None = None  # a row below this key is beyond the budget already

    def offer(self, frame: pl.DataFrame, key: np.ndarray, subtask: str | np.ndarray | None, task: str | None) -> None:
        """Consider rows; `key` is their score (float32) or hash (uint64), highest first."""
        if self._threshold is not None:
            near = key >= self._threshold
            self.cut |= not near.all()
            frame, key = frame.filter(near), key[near]
            subtask = subtask[near] if isinstance(subtask, np.ndarray) else subtask
        if not len(frame):
            return
        self._best.append(with_key(frame, key, subtask, task))
        self._waiting += len(frame)
        if self._waiting > max(len(self._best[0]), 4096):
            self.ranked()

    def ranked(self) -> pl.DataFrame | None:
        """The rows that matter, best first, equal keys by example id; None if there are none."""
        if not self._best:
            return None
        rows = pl.concat(self._best).sort(["key", "example_id"], descending=[True, False])
        if self._limit.rows is not None:
            kept = rows.head(self._limit.rows)
            full = len(kept) == self._limit.rows
            self.cut |= len(kept) < len(rows)
        else:
            if rows["loss_tokens"].has_nulls():
                raise ValueError("a token budget needs the column loss_tokens")
            before = rows["loss_tokens"].cast(pl.Int64).cum_sum() - rows["loss_tokens"]
            kept = rows.filter(before <= self._limit.tokens)
            full = len(kept) < len(rows)
            self.cut |= full
        if full:
            self._threshold = kept["key"][-1]
        self._best, self._waiting = [kept], 0
        return kept


def with_key(
    frame: pl.DataFrame, key: np.ndarray | None, subtask: str | np.ndarray | None, task: str | None
) -> pl.DataFrame:
    """The columns that a selection needs, and `key`, by which rows rank."""
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


# ---- what is passed over ----


@dataclass(frozen=True)
class Restraints:
    """Why a row is passed over although it comes next in its ranking.

    Attributes:
        quotas: Source -> largest share of the budget, rounded down to whole rows; sources not named have no limit.
        near_duplicates: Cosine with a row selected before from which a row is passed over; None: never.
        vectors: Called with rows (example_id, shard, row), sorted by shard and row; returns float32 (n, d) whose inner
            products are cosines. Needed for near-duplicates only.
    """

    quotas: Mapping[str, float] = field(default_factory=dict)
    near_duplicates: float | None = None
    vectors: Vectors | None = None


class _Quotas:
    """How much of the budget each limited source has left, in rows or in tokens."""

    def __init__(self, shares: Mapping[str, float], limit: Limit) -> None:
        self._in_tokens = limit.rows is None
        whole = limit.tokens if limit.rows is None else limit.rows
        self._left = {source: int(share * (whole or 0) + 1e-9) for source, share in shares.items()}

    def allow(self, source: str, tokens: int) -> bool:
        return source not in self._left or self._left[source] >= (tokens if self._in_tokens else 1)

    def spend(self, source: str, tokens: int) -> None:
        if source in self._left:
            self._left[source] -= tokens if self._in_tokens else 1


class _Row(NamedTuple):
    """The row that comes next."""

    example_id: str
    source: str
    loss_tokens: int


class _Ranking:
    """The best rows of an order while rows are taken from them.

    Attributes:
        cut: Whether the order had more rows than these.
    """

    def __init__(self, rows: pl.DataFrame, cut: bool) -> None:
        self.cut = cut
        self._rows = rows
        self._ids: list[str] = rows["example_id"].to_list()
        self._sources: list[str] = rows["source"].to_list()
        self._tokens: list[int] = rows["loss_tokens"].fill_null(0).to_list()
        self._next = 0
        self._taken: list[int] = []
        self._ranks: list[int] = []
        self._passed: list[tuple[int, int, str, str | None, float | None]] = []

    def best_left(self, gone: set[str]) -> _Row | None:
        """The best row that nobody has taken or passed over."""
        while self._next < len(self._ids) and self._ids[self._next] in gone:
            self._next += 1
        if self._next == len(self._ids):
            return None
        return _Row(self._ids[self._next], self._sources[self._next], self._tokens[self._next])

    def coming(self, count: int) -> pl.DataFrame:
        """Where that row and those after it stand."""
        return self._rows[self._next : self._next + count].select("example_id", "shard", "row")

    def take(self, rank: int) -> None:
        """Take that row as the selection's `rank`-th."""
        self._taken.append(self._next)
        self._ranks.append(rank)

    def pass_over(self, number: int, reason: str, kept: str | None, similarity: float | None) -> None:
        """Leave that row out, as the `number`-th that is."""
        self._passed.append((number, self._next, reason, kept, similarity))

    def taken(self) -> pl.DataFrame:
        return self._rows[self._taken].with_columns(pl.Series("rank", self._ranks, dtype=pl.Int64))

    def passed_over(self) -> pl.DataFrame:
        numbers, rows, reasons, kept, similarities = zip(*self._passed, strict=True) if self._passed else [()] * 5
        return self._rows[list(rows)].with_columns(
            pl.Series("number", numbers, dtype=pl.Int64),
            pl.Series("reason", reasons, dtype=pl.String),
            pl.Series("kept", kept, dtype=pl.String),
            pl.Series("similarity", similarities, dtype=pl.Float32),
        )


class _Neighbours:
    """The selected rows' vectors, and those of rows that come next, fetched many at a time.

    Args:
        threshold: Similarity from which two rows are near-duplicates.
        vectors: Fetches vectors of rows.
        rankings: Where rows come from.
        ahead: Rows of each ranking to fetch first; twice as many each time after.
    """

    def __init__(self, threshold: float, vectors: Vectors, rankings: Sequence[_Ranking], ahead: int) -> None:
        self._threshold, self._vectors, self._rankings, self._ahead = threshold, vectors, rankings, ahead
        self._fetched: dict[str, np.ndarray] = {}
        self._kept: list[str] = []
        self._matrix = np.empty((0, 0), dtype=np.float32)

    @classmethod
    def of(cls, restraints: Restraints, rankings: Sequence[_Ranking], limit: Limit) -> "_Neighbours | None":
        """None where no near-duplicate is passed over."""
        if restraints.near_duplicates is None or not rankings:
            return None
        assert restraints.vectors is not None
        ahead = max(64, 2 * (limit.rows or 0) // len(rankings))
        return cls(restraints.near_duplicates, restraints.vectors, rankings, ahead)

    def near(self, example_id: str, gone: set[str]) -> tuple[str, float] | None:
        """The selected row that a row is a near-duplicate of, and their similarity; None if there is none."""
        vector = self._vector(example_id, gone)
        if not self._kept:
            return None
        similar = self._matrix[: len(self._kept)] @ vector
        nearest = int(similar.argmax())
        similarity = float(similar[nearest])
        return (self._kept[nearest], similarity) if similarity >= self._threshold else None

    def keep(self, example_id: str) -> None:
        vector = self._fetched.pop(example_id)
        if len(self._kept) == len(self._matrix):
            larger = np.empty((max(64, 2 * len(self._matrix)), len(vector)), dtype=np.float32)
            larger[: len(self._kept)] = self._matrix[: len(self._kept)] if self._kept else 0
            self._matrix = larger
        self._matrix[len(self._kept)] = vector
        self._kept.append(example_id)

    def forget(self, example_id: str) -> None:
        self._fetched.pop(example_id, None)

    def _vector(self, example_id: str, gone: set[str]) -> np.ndarray:
        if example_id not in self._fetched:
            rows = pl.concat([ranking.coming(self._ahead) for ranking in self._rankings]).unique("example_id")
            known = pl.Series([*gone, *self._fetched], dtype=pl.String)
            rows = rows.filter(~pl.col("example_id").is_in(known.implode())).sort("shard", "row")
            self._fetched |= dict(zip(rows["example_id"].to_list(), self._vectors(rows), strict=True))
            self._ahead *= 2
        return self._fetched[example_id]


# ---- turns ----


def choose(
    best_rows: Callable[[Limit], Sequence[Sequence[BestRows]]], limit: Limit, restraints: Restraints
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Take rows in turn until the budget ends; from more rows again if one order ended first, as rows were passed over.

    Args:
        best_rows: Called with how far to look; returns the best rows of every order, for each task that takes turns.
        limit: The budget.
        restraints: What to pass over.

    Returns:
        The rows taken, by rank, and those passed over (`PASSED_OVER_SCHEMA`), in order.

    Raises:
        ProjectFileError: No row can be taken.
    """
    reach = limit
    while True:
        turns = [
            [_Ranking(rows, best.cut) for best in orders if (rows := best.ranked()) is not None]
            for orders in best_rows(reach)
        ]
        chosen = _take_in_turn(turns, limit, restraints)
        if chosen is not None:
            return chosen
        reach = reach.doubled()


def _take_in_turn(
    turns: list[list[_Ranking]], limit: Limit, restraints: Restraints
) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """Tasks take a row in turn, each from its rankings in turn, always the best that is left, until the budget ends.

    Returns:
        The rows taken and those passed over; None if a ranking that was cut has ended before the budget.
    """
    everyone = [ranking for rankings in turns for ranking in rankings]
    turn_taking = _TurnTaking(limit, restraints, everyone)
    while not turn_taking.spent and any(turns):
        for rankings in turns:
            if not turn_taking.take_from(rankings):
                return None
    turn_taking.require_rows()
    table = pl.concat([ranking.taken() for ranking in everyone]).sort("rank")
    passed_over = pl.concat([ranking.passed_over() for ranking in everyone]).sort("number")
    return table, passed_over.select(PASSED_OVER_SCHEMA.names())


class _TurnTaking:
    """The rows taken and passed over so far.

    Args:
        limit: The budget.
        restraints: What to pass over.
        rankings: Where rows come from.

    Attributes:
        spent: Whether the budget has ended.
    """

    def __init__(self, limit: Limit, restraints: Restraints, rankings: Sequence[_Ranking]) -> None:
        self._limit = limit
        self._quotas = _Quotas(restraints.quotas, limit)
        self._neighbours = _Neighbours.of(restraints, rankings, limit)
        self._gone: set[str] = set()
        self._rows = self._tokens = 0
        self.spent = False

    def take_from(self, rankings: list[_Ranking]) -> bool:
        """Let a task take one row, from the first of its rankings, which goes to the end; those that ended leave.

        Returns:
            False if a ranking that was cut has ended, so that the best row that is left is not known.
        """
        while rankings and not self.spent:
            row = rankings[0].best_left(self._gone)
            if row is None:
                if rankings[0].cut:
                    return False
                rankings.pop(0)
            elif not self._passes_over(row, rankings[0]):
                self._take(row, rankings[0])
                rankings.append(rankings.pop(0))
                break
        return True

    def _passes_over(self, row: _Row, ranking: _Ranking) -> bool:
        near = None
        if self._quotas.allow(row.source, row.loss_tokens):
            near = self._neighbours.near(row.example_id, self._gone) if self._neighbours else None
            if near is None:
                return False
        self._gone.add(row.example_id)
        kept, similarity = near or (None, None)
        ranking.pass_over(len(self._gone), "near_duplicate" if near else "quota", kept, similarity)
        if self._neighbours:
            self._neighbours.forget(row.example_id)
        return True

    def _take(self, row: _Row, ranking: _Ranking) -> None:
        """Take a row, unless it does not fit the token budget, which then ends."""
        self._tokens += row.loss_tokens
        if self._limit.tokens is not None and self._tokens > self._limit.tokens:
            self.spent = True
            return
        self._rows += 1
        self._gone.add(row.example_id)
        self._quotas.spend(row.source, row.loss_tokens)
        if self._neighbours:
            self._neighbours.keep(row.example_id)
        ranking.take(self._rows)
        self.spent = self._rows == self._limit.rows

    def require_rows(self) -> None:
        """Raise ProjectFileError if no row was taken."""
        if self._rows:
            return
        if self._tokens:
            what = f"The best row alone has more than {self._limit.tokens} loss tokens."
            raise ProjectFileError(what, fix="Raise the recipe's `tokens`.")
        if self._gone:
            raise ProjectFileError("No row is left: the quotas allow none.", fix="Raise the recipe's `quotas`.")
        raise ProjectFileError("No row has a score.", fix="Look at the row statuses of `train_gradients`.")


def select_from_sample(scores: np.ndarray, queues: Sequence[Queue], rows: int) -> pl.DataFrame:
    """What a recipe would select from a few thousand rows whose scores are all in memory.

    Args:
        scores: Scores (m, J), all finite.
        queues: `queues_of` the recipe.
        rows: How many to take.

    Returns:
        Rank, example_id (the row's place as text), score, task and subtask (null where the task has one order) of each
        selected row.
    """
    places = pl.int_range(len(scores), eager=True)
    width = len(str(len(scores)))  # with leading zeros equal scores rank by place
    frame = pl.DataFrame({"example_id": places.cast(pl.String).str.zfill(width), "row": places})
    frame = frame.with_columns(source=pl.lit(""), shard=pl.lit(""))

    def best_rows(limit: Limit) -> list[list[BestRows]]:
        tasks: dict[str, list[BestRows]] = {queue.task: [] for queue in queues}
        for queue in queues:
            best = BestRows(limit)
            best.offer(frame, queue.scores(scores), queue.subtask, queue.task)
            tasks[queue.task].append(best)
        return list(tasks.values())

    chosen, _ = choose(best_rows, Limit(rows, None), Restraints())
    return chosen.select("rank", "example_id", "score", "task", "subtask")
