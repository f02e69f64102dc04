"""Confidence intervals for means over graded samples.

Belongs here: the bootstrap, on plain arrays. Which samples are compared is decided in `evaluation.py` and
`leaderboard.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

REPLICATES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap percentile interval; all NaN if a value is NaN."""

    mean: float
    low: float
    high: float


def clustered_bootstrap(
    values: np.ndarray,
    clusters: Sequence[str],
    *,
    average: Literal["samples", "subtasks"] = "samples",
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return the mean of samples and its two-stage cluster bootstrap interval.

    Each replicate draws as many subtasks as there are, with replacement, then as many samples within each drawn subtask
    as it has, with replacement, and takes the mean; the interval is the central percentile range of the replicates
    (Davison and Hinkley 1997, §3.8; the percentile method of Efron 1979). Samples of one subtask share a prompt format
    and difficulty, so they are not independent: drawing subtasks as well widens the interval accordingly. With a single
    subtask this is the ordinary bootstrap over samples.

    Args:
        values: Float array (n,), n >= 1: scores, losses or paired differences.
        clusters: Subtask of each value, length n.
        average: "samples": every sample counts the same; "subtasks": every subtask does.
        replicates: Number of bootstrap replicates.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling; equal input and seed give equal intervals.

    Raises:
        ValueError: If there are no values, or the lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"{len(values)} values for {len(clusters)} cluster labels; need equally many, at least one")
    if not np.isfinite(values).all():
        return Interval(float("nan"), float("nan"), float("nan"))
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    groups = [values[index == j] for j in range(len(names))]
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    rng = np.random.default_rng(seed)

    drawn = rng.integers(0, len(groups), size=(replicates, len(groups)))
    means = np.empty(drawn.shape)
    for j, group in enumerate(groups):
        slots = drawn == j
        means[slots] = _resampled_means(group, int(slots.sum()), rng)
    if average == "samples":
        weights = sizes[drawn]
        statistics = (means * weights).sum(axis=1) / weights.sum(axis=1)
        mean = values.mean()
    else:
        statistics = means.mean(axis=1)
        mean = np.mean([group.mean() for group in groups])
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return Interval(float(mean), float(low), float(high))


def crossed_bootstrap(
    values: np.ndarray,
    clusters: Sequence[str],
    *,
    replicates: int = REPLICATES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """Return the mean over training seeds and samples, and its bootstrap interval over both.

    Every seed met every sample, so both are drawn, each for itself (the pigeonhole bootstrap of Owen 2007, "The
    pigeonhole bootstrap"). Samples are drawn as `clustered_bootstrap` does, every sample counting the same. Of S seeds,
    S - 1 are drawn with replacement: so the variance between few seeds is not underestimated (Rao and Wu 1988,
    "Resampling inference with complex survey data"). With two seeds an interval therefore lies off 0 only if each seed
    by itself says so.

    Args:
        values: Float array (S, n), S >= 1, n >= 1: losses, scores or paired differences; with S = 1 only samples vary.
        clusters: Subtask of each sample, length n.
        replicates: Number of bootstrap replicates.
        confidence: Coverage of the interval, in (0, 1).
        seed: Seed of the resampling; equal input and seed give equal intervals.

    Raises:
        ValueError: If there are no values, or the lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0 or values.shape[1] != len(clusters):
        raise ValueError(f"values of shape {values.shape} for {len(clusters)} cluster labels; need seeds x samples")
    if not np.isfinite(values).all():
        return Interval(float("nan"), float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    means = values @ _sample_weights(clusters, replicates, rng).T
    seeds = len(values)
    drawn = rng.integers(0, seeds, size=(replicates, max(1, seeds - 1)))
    statistics = means.T[np.arange(replicates)[:, None], drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail])
    return Interval(float(values.mean()), float(low), float(high))


def _sample_weights(clusters: Sequence[str], replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Return (replicates, n): the weight of each sample in the mean of each replicate; rows sum to 1."""
    names, index = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=replicates)
    counts = np.empty((replicates, len(index)))
    for j in range(len(names)):
        members = np.flatnonzero(index == j)
        size = len(members)
        counts[:, members] = rng.multinomial(drawn[:, j] * size, np.full(size, 1 / size))
    counts /= counts.sum(axis=1, keepdims=True)
    return counts


def _resampled_means(group: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return (count,) means of `group` drawn with replacement, in blocks that keep memory below some 100 MB."""
    block = max(1, 4_000_000 // len(group))
    sizes = [min(block, count - start) for start in range(0, count, block)]
    return np.concatenate(
        [group[rng.integers(0, len(group), size=(n, len(group)))].mean(axis=1) for n in sizes] or [[]]
    )
