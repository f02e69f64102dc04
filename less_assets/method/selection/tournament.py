"""Which candidate a tournament chooses, by what the pilots of all candidates lost or scored on the same examples.

Belongs here: the rule, on plain arrays. Not here: selecting rows for pilots, training and judging them, which is what
`steps/tournament.py` does with the functions that make any subset and any model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from less_assets.method.evaluation.intervals import CONFIDENCE, REPLICATES, Interval, crossed_bootstrap

ENOUGH_QUESTIONS = 100
"""Graded questions below which a score says less than a loss: its standard error is up to 0.05 with so many."""
ENOUGH_OF_EACH = 10
"""Right answers above guessing, and wrong ones, below which a score cannot tell candidates apart."""


@dataclass(frozen=True)
class Standing:
    """How a candidate's pilots did.

    Attributes:
        candidate: Its name.
        mean: Mean loss or score over seeds and examples.
        difference: Paired difference from the reference's, with its interval; None for the reference itself.
        beats_reference: Whether that interval lies wholly on the better side of 0.
        price: What its selection costs.
    """

    candidate: str
    mean: float
    difference: Interval | None
    beats_reference: bool
    price: float


@dataclass(frozen=True)
class Choice:
    """What a tournament chooses.

    Attributes:
        winner: Name of the candidate.
        why: One sentence.
        standings: Of all candidates, in the order given.
    """

    winner: str
    why: str
    standings: list[Standing]


def choose(
    values: Mapping[str, np.ndarray],
    clusters: Sequence[str],
    prices: Mapping[str, float],
    *,
    reference: str,
    higher_is_better: bool,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
) -> Choice:
    """Choose a candidate: the best of those that beat the reference, or a cheaper one that ties with it.

    All comparisons are paired, seed by seed and example by example, with intervals over both
    (`intervals.crossed_bootstrap`). A candidate beats the reference (random rows) if the interval of its difference
    lies wholly on the better side of 0; if none does, the reference is chosen. Among those that do, the one with the
    best mean leads. Others of them tie with it if the interval of the difference between the two includes 0; of those
    that tie the cheapest is chosen, at equal prices the one with the better mean.

    Args:
        values: Candidate -> losses or scores of its pilots, float (S, n): training seeds by examples, all of one shape.
        clusters: Subtask of each example, length n.
        prices: Candidate -> what its selection costs, in any unit.
        reference: Name of the candidate that draws at random.
        higher_is_better: Whether the values are scores.
        replicates: Bootstrap replicates.
        confidence: Coverage of the intervals.

    Raises:
        ValueError: The reference is no candidate, or the candidates' values differ in shape.
    """
    if reference not in values or len({array.shape for array in values.values()}) > 1:
        raise ValueError(f"{reference} must be a candidate, and all values of one shape")
    sign = 1.0 if higher_is_better else -1.0

    def compare(first: str, second: str) -> Interval:
        return crossed_bootstrap(values[first] - values[second], clusters, replicates=replicates, confidence=confidence)

    def is_better(interval: Interval) -> bool:
        return interval.low > 0 if higher_is_better else interval.high < 0

    differences = {name: None if name == reference else compare(name, reference) for name in values}
    means = {name: float(np.mean(array)) for name, array in values.items()}
    winners = [name for name, interval in differences.items() if interval is not None and is_better(interval)]
    standings = [
        Standing(name, means[name], differences[name], name in winners, float(prices[name])) for name in values
    ]
    if not winners:
        return Choice(reference, f"no candidate beats {reference}: take {reference}, which costs nothing", standings)
    ranked = sorted(winners, key=lambda name: -sign * means[name])
    leader = ranked[0]
    tied = [name for name in ranked if name == leader or not is_better(compare(leader, name))]
    winner = min(tied, key=lambda name: prices[name])
    return Choice(winner, _reason(winner, leader, tied, winners, reference), standings)


def _reason(winner: str, leader: str, tied: Sequence[str], winners: Sequence[str], reference: str) -> str:
    if len(winners) == 1:
        return f"{winner} is the only candidate that beats {reference}"
    if winner != leader:
        return f"{winner} beats {reference}, ties with {leader}, the best on average, and is cheaper"
    others = ", ".join(name for name in tied if name != winner)
    if others:
        return f"{winner} beats {reference} and is the best on average; {others}, with which it ties, is not cheaper"
    return f"{winner} beats {reference} and every other candidate"


def can_tell_apart(scores: np.ndarray, chance: float) -> bool:
    """Whether there are enough graded questions for a score to judge: many, and neither all wrong nor all right.

    A model that only guesses scores alike whatever it was trained on; the loss shows what it learned all the same.

    Args:
        scores: Scores of the reference's pilots, 0 to 1, float (S, n).
        chance: Mean score of guessing.
    """
    questions: int = scores.shape[1]
    if questions < ENOUGH_QUESTIONS or not np.isfinite(scores).all():
        return False
    right = float(scores.mean())
    by_luck = 2 * math.sqrt(chance * (1 - chance) / questions)
    above_guessing, wrong = (right - chance - by_luck) * questions, (1 - right) * questions
    return min(above_guessing, wrong) >= ENOUGH_OF_EACH
