"""From scores to a ranked subset: budgets, aggregation over subtasks, ties, turns between tasks.

Belongs here: every strategy's ranking, streamed shard by shard. Not here: where scores come from (influence.py,
baselines.py) and the rows' text, which the asset joins by id.

Memory holds one shard and the best rows so far, never all scores. The result does not depend on how the pool is cut
into shards or in which order they come (but for `select_all`, which keeps the pool's order).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl

from less_assets.errors import PoolFormatError, ProjectFileError
from less_assets.method.selection.baselines import draw_key, with_gumbel_noise
from less_assets.method.selection.ranking import score_matrix

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

Shards = Callable[[], Iterable[pl.DataFrame]]
Vectors = Callable[[pl.DataFrame], np.ndarray]


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
    if aggregate not in AGGREGATES:
        raise ValueError(f"unknown aggregate {aggregate!r}; known are {list(AGGREGATES)}")
    usable, removed = _count(candidates[0].shards)
    limit = _Limit.of(budget, usable)
    unscored = 0

    def ranked(reach: _Limit) -> list[list[_Queue]]:
        nonlocal unscored
        members = []
        for member in candidates:
            queues, lost = _rank(member, aggregate, reach)
            members.append(queues)
            unscored = max(unscored, lost)
        return members

    table, passed_over = _choose(ranked, limit, restraints or Restraints())
    if unscored:
        removed["no_score"] = unscored
    return _selection(table, usable - unscored, removed, passed_over)


def _rank(member: Candidates, aggregate: str, reach: "_Limit") -> tuple[list["_Queue"], int]:
    """Rank a task's pool: one queue, or with `round_robin` one a column; and how many usable rows have no score."""
    queues = [_Queue(reach) for _ in (member.labels if aggregate == "round_robin" else "1")]
    lost = 0
    for frame in member.shards():
        frame = _usable(frame)
        scores = _scores(frame, member)
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
    return queues, lost


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
    key = draw_key(seed, stream)

    def ranked(reach: _Limit) -> list[list[_Queue]]:
        queue = _Queue(reach)
        for frame in shards():
            frame = _usable(frame)
            ids = frame["example_id"].to_list()
            if log_weights is None:
                keys = np.asarray([_random_key(example_id, key) for example_id in ids], dtype=np.uint64)
            else:
                keys = with_gumbel_noise(log_weights(frame), ids, seed, stream).astype(np.float64)
            queue.offer(frame, keys, None, None)
        return [[queue]]

    table, passed_over = _choose(ranked, _Limit.of(budget, usable), restraints or Restraints())
    return _selection(table, usable, removed, passed_over)


def select_all(shards: Shards) -> Selection:
    """Take every usable row once, in the order of the pool."""
    usable, removed = _count(shards)
    frames = [_with_key(_usable(frame), None, None, None) for frame in shards()]
    return _selection(pl.concat(frames), usable, removed, pl.DataFrame(schema=PASSED_OVER_SCHEMA))


def _random_key(example_id: str, key: bytes) -> int:
    digest = hashlib.blake2b(example_id.encode(), digest_size=8, key=key).digest()
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

    def doubled(self) -> "_Limit":
        return _Limit(None if self.rows is None else 2 * self.rows, None if self.tokens is None else 2 * self.tokens)


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
    if scores.shape[1] != len(member.labels):
        raise ValueError(
            f"column {member.column} holds {scores.shape[1]} scores a row for {len(member.labels)} subtasks"
        )
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
    With tokens, likewise, never beyond the row with which its tokens exceed the budget. Where rows are passed over that
    may not be enough: then the queues are made again, twice as long (`_choose`).

    Attributes:
        cut: Whether there were more rows than it kept.
    """

    def __init__(self, limit: _Limit) -> None:
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


class _Ranking:
    """A ranked queue while rows are taken from it.

    Attributes:
        cut: Whether the queue had more rows than it kept.
    """

    def __init__(self, rows: pl.DataFrame, cut: bool) -> None:
        self.cut = cut
        self._rows = rows
        self._ids: list[str] = rows["example_id"].to_list()
        self._sources: list[str] = rows["source"].to_list()
        self._costs: list[int] = rows["loss_tokens"].fill_null(0).to_list()
        self._next = 0
        self._places: list[int] = []
        self._ranks: list[int] = []
        self._passed: list[tuple[int, int, str, str | None, float | None]] = []

    def best_left(self, gone: set[str]) -> tuple[str, str, int] | None:
        """Id, source and loss tokens of the best row that nobody has taken or passed over."""
        while self._next < len(self._ids) and self._ids[self._next] in gone:
            self._next += 1
        if self._next == len(self._ids):
            return None
        return self._ids[self._next], self._sources[self._next], self._costs[self._next]

    def coming(self, count: int) -> pl.DataFrame:
        """Where that row and those after it stand."""
        return self._rows[self._next : self._next + count].select("example_id", "shard", "row")

    def take(self, rank: int) -> None:
        """Take that row as the selection's `rank`-th."""
        self._places.append(self._next)
        self._ranks.append(rank)

    def pass_over(self, number: int, reason: str, kept: str | None, similarity: float | None) -> None:
        """Leave that row out, as the `number`-th that is."""
        self._passed.append((number, self._next, reason, kept, similarity))

    def taken(self) -> pl.DataFrame:
        return self._rows[self._places].with_columns(pl.Series("rank", self._ranks, dtype=pl.Int64))

    def passed_over(self) -> pl.DataFrame:
        numbers, places, reasons, kept, similarities = zip(*self._passed, strict=True) if self._passed else [()] * 5
        return self._rows[list(places)].with_columns(
            pl.Series("number", numbers, dtype=pl.Int64),
            pl.Series("reason", reasons, dtype=pl.String),
            pl.Series("kept", kept, dtype=pl.String),
            pl.Series("similarity", similarities, dtype=pl.Float32),
        )


class _Quotas:
    """How much of the budget each limited source has left, in rows or in tokens."""

    def __init__(self, shares: Mapping[str, float], limit: _Limit) -> None:
        self._in_tokens = limit.rows is None
        whole = limit.tokens if limit.rows is None else limit.rows
        self._left = {source: int(share * (whole or 0) + 1e-9) for source, share in shares.items()}

    def allow(self, source: str, cost: int) -> bool:
        return source not in self._left or self._left[source] >= (cost if self._in_tokens else 1)

    def spend(self, source: str, cost: int) -> None:
        if source in self._left:
            self._left[source] -= cost if self._in_tokens else 1


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

    def near(self, example_id: str, gone: set[str]) -> tuple[str, float] | None:
        """The selected row that a row is a near-duplicate of, and their similarity; None if there is none."""
        vector = self._vector(example_id, gone)
        if not self._kept:
            return None
        similar = self._matrix[: len(self._kept)] @ vector
        nearest = int(similar.argmax())
        found = float(similar[nearest])
        return (self._kept[nearest], found) if found >= self._threshold else None

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


def _choose(
    ranked: Callable[[_Limit], Sequence[Sequence[_Queue]]], limit: _Limit, restraints: Restraints
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Take rows in turn; with longer queues again if one ended before the budget did because rows were passed over."""
    reach = limit
    while True:
        members = ranked(reach)
        turns = [
            [_Ranking(frame, queue.cut) for queue in queues if (frame := queue.ranked()) is not None]
            for queues in members
        ]
        found = _take_in_turn(turns, limit, restraints)
        if found is not None:
            return found
        reach = reach.doubled()


def _take_in_turn(
    turns: list[list[_Ranking]], limit: _Limit, restraints: Restraints
) -> tuple[pl.DataFrame, pl.DataFrame] | None:
    """Members take a row in turn, each from its queues in turn, always the best that is left, until the budget ends.

    Returns:
        The rows taken and those passed over; None if a queue that was cut has ended before the budget.
    """
    everyone = [ranking for queues in turns for ranking in queues]
    quotas, neighbours = _Quotas(restraints.quotas, limit), None
    if restraints.near_duplicates is not None and everyone:
        assert restraints.vectors is not None
        ahead = max(64, 2 * (limit.rows or 0) // len(everyone))
        neighbours = _Neighbours(restraints.near_duplicates, restraints.vectors, everyone, ahead)
    gone: set[str] = set()
    rows = tokens = 0
    spent = False
    while not spent and any(turns):
        for queues in turns:
            taken = False
            while queues and not (taken or spent):
                found = queues[0].best_left(gone)
                if found is None:
                    if queues[0].cut:
                        return None
                    queues.pop(0)
                    continue
                example_id, source, cost = found
                near = None
                allowed = quotas.allow(source, cost)
                if allowed and neighbours:
                    near = neighbours.near(example_id, gone)
                if not allowed or near:
                    gone.add(example_id)
                    reason = "near_duplicate" if near else "quota"
                    queues[0].pass_over(len(gone), reason, *(near or (None, None)))
                    if neighbours:
                        neighbours.forget(example_id)
                    continue
                tokens += cost
                if limit.tokens is not None and tokens > limit.tokens:
                    spent = True
                    break
                rows, taken = rows + 1, True
                gone.add(example_id)
                quotas.spend(source, cost)
                if neighbours:
                    neighbours.keep(example_id)
                queues[0].take(rows)
                queues.append(queues.pop(0))
                spent = rows == limit.rows
            if spent:
                break
    if not rows:
        raise ProjectFileError(
            f"The best row alone has more than {limit.tokens} loss tokens."
            if tokens
            else "No row is left: the quotas allow none."
            if gone
            else "No row has a score.",
            fix="Raise the recipe's `tokens`."
            if tokens
            else "Raise the recipe's `quotas`."
            if gone
            else "Look at the row statuses of `train_gradients`.",
        )
    table = pl.concat([ranking.taken() for ranking in everyone]).sort("rank")
    passed_over = pl.concat([ranking.passed_over() for ranking in everyone]).sort("number")
    return table, passed_over.select(PASSED_OVER_SCHEMA.names())


def _selection(rows: pl.DataFrame, usable: int, removed: Counter[str], passed_over: pl.DataFrame) -> Selection:
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
