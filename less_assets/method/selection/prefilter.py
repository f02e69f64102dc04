"""What a prefilter loses: which of the rows it leaves out are sampled, and what the sample says of a selection.

Belongs here: pure functions of ids and scores. Which rows a prefilter keeps is a selection like any other
(`selection.py`); files and gradients are the steps' matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.stats import beta

from less_assets.method.selection.ranking import Queue, select_from_sample
from less_assets.method.selection.selection import draw_numbers

STREAM = "prefilter"
"""Stream of the draw of the sample."""
LEVEL = 0.95
"""Confidence of the interval."""


@dataclass(frozen=True)
class Recall:
    """The share of the rows that would have been selected from the whole pool which are still selected.

    Attributes:
        estimate: Estimated share.
        low: Lower end of its interval.
        high: Upper end.
    """

    estimate: float
    low: float
    high: float


def drawn_by_id(ids: Sequence[str], share: float) -> np.ndarray:
    """Which rows belong to a random sample of a share of all rows, bool (n,).

    An id's keyed hash decides, so a row's fate depends on no other row: an appended shard changes the sample of another
    one only as far as `share` changes.

    Args:
        ids: Ids of n distinct rows.
        share: Chance of each row; 1 or more takes all.
    """
    # float64 rounds the highest hashes up to 2**64: a share of 1 must take them, too.
    drawn: np.ndarray = draw_numbers(ids, 0, STREAM).astype(np.float64) < share * 2.0**64
    return drawn if share < 1 else np.ones(len(ids), dtype=bool)


def estimate_recall(
    selected: np.ndarray, sample: np.ndarray, queues: Sequence[Queue], *, dropped: int, sampled: int
) -> Recall:
    """Estimate a selection's recall from a random sample of the rows that a prefilter dropped.

    The selection from the whole pool is imitated: the selected rows compete with the sampled ones, each of which stands
    for all the dropped rows that it was drawn from. (No other kept row would be selected from the whole pool, where the
    kept rows compete with more.) The share of the dropped rows that win gets Clopper and Pearson's interval (1934), the
    number of sampled rows corrected for a finite population. It is cautious: a sample with too many good rows also
    lifts the cut, which the interval does not count on.

    Args:
        selected: Scores of the b selected rows, float32 (b, J).
        sample: Scores of the sampled rows, float32 (≤ `sampled`, J); rows that could not be selected are NaN or left
            out.
        queues: The orders by which rows are taken.
        dropped: Distinct rows that the prefilter dropped.
        sampled: Those among them that were sampled at random; at least one unless `dropped` is 0.

    Returns:
        The estimate and its interval.

    Raises:
        ValueError: Nothing was sampled or selected.
    """
    if not len(selected) or (dropped and not 0 < sampled <= dropped) or len(sample) > sampled:
        raise ValueError(f"{len(sample)} of {sampled} rows sampled from {dropped}, {len(selected)} selected")
    if not dropped:
        return Recall(1.0, 1.0, 1.0)
    scored = sample[np.isfinite(sample).all(axis=1)]
    # Whole copies that add up to the dropped rows: 3, 4, 3, 4, ... where a row stands for three and a half.
    copies = np.diff(np.floor(np.arange(len(scored) + 1) * (dropped / sampled) + 0.5).astype(np.int64))
    competing = np.concatenate([selected, np.repeat(scored, copies, axis=0)])
    taken = select_from_sample(competing, queues, len(selected))
    missed = int((taken["example_id"].cast(pl.Int64) >= len(selected)).sum())
    fewest, most = _interval(missed, dropped, sampled)
    shares = (1 - rows / len(selected) for rows in (missed, min(most, len(selected)), fewest))
    return Recall(*shares)


def _interval(missed: int, dropped: int, sampled: int) -> tuple[float, float]:
    """The interval of a number of dropped rows that a random sample of them was used to estimate."""
    if sampled == dropped:
        return missed, missed
    rows = sampled * (dropped - 1) / (dropped - sampled)
    hits, tail = rows * missed / dropped, (1 - LEVEL) / 2
    fewest = float(beta.ppf(tail, hits, rows - hits + 1)) if missed else 0.0
    most = float(beta.ppf(1 - tail, hits + 1, rows - hits)) if missed < dropped else 1.0
    return fewest * dropped, most * dropped
