"""A selection of which a share is drawn at random: some of everything keeps a model from forgetting the rest.

Belongs here: dividing a budget, and putting the two parts together. Not here: either part (selection.py).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import polars as pl

from less_assets.errors import ProjectFileError
from less_assets.method.selection.ranking import Restraints
from less_assets.method.selection.selection import Budget, Selection, select_at_random, selection_of

STREAM = "mix"
"""Stream of the draw: independent of a recipe's own draws at equal seeds."""


def divide(budget: Budget, share: float) -> tuple[Budget, Budget]:
    """What is chosen and what is drawn: `share` of the budget is drawn, rounded down, and nothing is counted twice.

    Args:
        budget: In rows or tokens.
        share: 0 < share < 1.

    Raises:
        ProjectFileError: The share is less than one row or token, or leaves nothing to choose.
    """
    drawn = int(share * budget.amount + 1e-9)
    if not 0 < drawn < budget.amount:
        raise ProjectFileError(
            f"A share of {share:g} of {budget.amount:g} {budget.kind} is {drawn}.",
            where="mix.share",
            fix="raise the budget, or the share",
        )
    return Budget(budget.kind, budget.amount - drawn), Budget(budget.kind, drawn)


def mix(
    chosen: Selection,
    shards: Callable[[], Iterable[pl.DataFrame]],
    budget: Budget,
    seed: int,
    *,
    sources: Iterable[str] | None = None,
    restraints: Restraints | None = None,
) -> Selection:
    """Add rows that are drawn at random from those that were neither chosen nor passed over.

    They rank behind the chosen ones, in the order of the draw, without score, subtask and task.

    Args:
        chosen: What was chosen.
        shards: The pool's rows; see `selection.Candidates`.
        budget: How much to draw, in rows or tokens.
        seed: Seed of the draw.
        sources: Sources to draw from; None: all.
        restraints: What to pass over in the draw.

    Raises:
        PoolFormatError: No row is left to draw.
    """
    settled = pl.concat([chosen.table["example_id"], chosen.passed_over["example_id"]]).implode()
    left = ~pl.col("example_id").is_in(settled)
    if sources is not None:
        left &= pl.col("source").is_in(list(sources))

    def rest() -> Iterator[pl.DataFrame]:
        for table in shards():
            yield table.filter(left)

    drawn = select_at_random(rest, budget, seed, stream=STREAM, restraints=restraints)
    return selection_of(
        pl.concat([chosen.table.drop("rank"), drawn.table.drop("rank")]),
        chosen.summary.usable,
        Counter(chosen.summary.removed) - Counter(chosen.passed_over["reason"].to_list()),
        pl.concat([chosen.passed_over, drawn.passed_over]),
    )
