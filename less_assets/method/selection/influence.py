"""Influence of pool rows on target examples: directions of the targets, cosines, sums over checkpoints.

Belongs here: the mathematics of steps 3 and 4 (method.md) and the score table's columns. Not here: ranking
(selection.py) and files; features come in as anything that yields blocks of rows.

Both subtask rules are linear in the row's unit vector, so each subtask is one direction, and scoring a block is one
matrix product for all tasks, subtasks and rules together. LESS (arXiv 2402.04333), section 4.2.
"""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Protocol

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from less_assets.errors import TargetFormatError
from less_assets.method.gradients.quantization import decode
from less_assets.method.selection.coded_directions import ROWS_AT_A_TIME, CodedDirections

SUBTASK_RULES = ("mean_cosine", "cosine_of_mean")
SIMILARITY_DIMENSION = 2048

ScoreArrays = dict[str, np.ndarray]  # column of the score table -> float32 (rows, J)


class FeatureSource(Protocol):
    """Features of the rows of one pool shard at one checkpoint, for example `store.features.FeatureReader`."""

    rows: int
    storage: str
    dimension: int

    @property
    def code_blocks(self) -> int:
        """Number of stored blocks."""
        ...

    @property
    def code_block_bytes(self) -> int:
        """Bytes of the buffer that `codes` takes."""
        ...

    def codes(self, form: str, index: int, buffer: np.ndarray | None = None) -> tuple[int, np.ndarray, np.ndarray]:
        """First row, codes (maybe in the buffer) and float32 scales of a stored block; called from several threads."""
        ...


def target_directions(features: np.ndarray, subtasks: Sequence[str], rule: str) -> tuple[list[str], np.ndarray]:
    """One direction per subtask, such that a row's influence on the subtask is `unit(row) @ direction`.

    Args:
        features: float32 (m, k), gradients (or their sketches) of the m target examples.
        subtasks: Label of each example, in any order; sizes may differ.
        rule: `mean_cosine`, the mean over the subtask's examples of their cosines (the published code), or
            `cosine_of_mean`, the cosine with the subtask's mean gradient (the paper, equation 3).

    Returns:
        labels: The J subtasks, sorted.
        directions: float32 (J, k).

    Raises:
        TargetFormatError: There are no examples, or a gradient (or a mean of them) is zero or not finite.
        ValueError: The rule is unknown or the lengths differ.
    """
    if rule not in SUBTASK_RULES:
        raise ValueError(f"unknown subtask rule {rule!r}; known are {list(SUBTASK_RULES)}")
    if len(subtasks) != len(features):
        raise ValueError(f"{len(features)} target gradients with {len(subtasks)} subtask labels")
    if not len(features):
        raise TargetFormatError("The task has no target examples.")
    rows = np.asarray(features, dtype=np.float64)
    if rule == "mean_cosine":
        rows = _units(rows, [f"target example {number + 1}" for number in range(len(rows))])
    names = np.asarray(subtasks)
    labels = sorted(set(subtasks))
    means = np.stack([rows[names == label].mean(axis=0) for label in labels])
    if rule == "cosine_of_mean":
        means = _units(means, [f"the mean of subtask {label}" for label in labels])
    return labels, means.astype(np.float32)


def _units(rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1)
    bad = [name for name, norm in zip(names, norms, strict=True) if not (np.isfinite(norm) and norm > 0)]
    if bad:
        raise TargetFormatError(
            f"The gradient is zero or not finite, so nothing can point along it: {', '.join(bad[:5])}.",
            fix="Look at those examples' completions, or train the warm-up in a wider number format.",
        )
    unit: np.ndarray = rows / norms[:, None]
    return unit


def normalised_weights(learning_rates: Mapping[str, float]) -> dict[str, float]:
    """Weights of the checkpoints: mean learning rates η̄_i divided by their sum.

    Raises:
        ValueError: A rate is negative or not finite, or all are zero.
    """
    total = sum(learning_rates.values())
    if not all(rate >= 0 for rate in learning_rates.values()) or not 0 < total < np.inf:
        raise ValueError(f"mean learning rates must be finite, not negative, and not all zero: {dict(learning_rates)}")
    return {checkpoint: rate / total for checkpoint, rate in learning_rates.items()}


def score_block(features: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Cosine-type scores of a block: `unit(row) @ direction` for every row and direction.

    Args:
        features: float32 (n, k), decoded; only their direction counts.
        directions: float32 (J, k), from `target_directions`.

    Returns:
        float32 (n, J). Rows that are zero or not finite score NaN, and never rank.
    """
    norms = np.sqrt(np.einsum("nk,nk->n", features, features))
    with np.errstate(divide="ignore", invalid="ignore"):
        scores: np.ndarray = (features @ directions.T) / norms[:, None]
    scores[~(np.isfinite(norms) & (norms > 0))] = np.nan
    return scores


def score_shard(
    sources: Mapping[str, FeatureSource],
    directions: Mapping[str, Mapping[tuple[str, str], np.ndarray]],
    weights: Mapping[str, float],
    forms: Sequence[str],
) -> dict[str, ScoreArrays]:
    """Influence of every row of a shard on every subtask of every task, in one pass over the features.

    Args:
        sources: Checkpoint -> the shard's features there.
        directions: Checkpoint -> (task, rule) -> float32 (J, k).
        weights: Checkpoint -> η̄_i, summing to 1 (`normalised_weights`).
        forms: Direction forms to score.

    Returns:
        Task -> column -> float32 (rows, J). Column `{form}.{rule}.{checkpoint}` holds unweighted cosines at that
        checkpoint, `{form}.{rule}` their weighted sum (method.md, step 4).

    Raises:
        ValueError: Checkpoints or rows do not agree.
    """
    if not sources.keys() == directions.keys() == weights.keys():
        raise ValueError(f"checkpoints differ: {sorted(sources)}, {sorted(directions)}, {sorted(weights)}")
    rows = {source.rows for source in sources.values()}
    if len(rows) > 1:
        raise ValueError(f"the shard has {sorted(rows)} rows at different checkpoints")
    results: dict[str, ScoreArrays] = {}
    for form in forms:
        for checkpoint, source in sources.items():
            asked = directions[checkpoint]
            stacked = np.ascontiguousarray(np.concatenate(list(asked.values())), dtype=np.float32)
            # Each task's directions by themselves: its scores are the same whichever tasks are scored with it.
            groups = [sum(len(asked[key]) for key in keys) for _, keys in groupby(asked, key=lambda key: key[0])]
            cosines = _score_source(source, form, stacked, groups)
            start = 0
            for (task, rule), targets in asked.items():
                part = cosines[:, start : start + len(targets)]
                start += len(targets)
                columns = results.setdefault(task, {})
                columns[f"{form}.{rule}.{checkpoint}"] = part
                total = columns.get(f"{form}.{rule}", np.float32(0))
                columns[f"{form}.{rule}"] = total + np.float32(weights[checkpoint]) * part
    return results


def _score_source(source: FeatureSource, form: str, directions: np.ndarray, groups: Sequence[int]) -> np.ndarray:
    """Scores (rows, J) of all rows of a source: blocks are read and multiplied on all cores at once.

    Each thread has its own blocks and multiplies the same few rows at a time, so scores do not depend on the number of
    threads.
    """
    coded = CodedDirections(directions, source.storage, groups)
    cosines = np.empty((source.rows, len(directions)), dtype=np.float32)
    thread = threading.local()

    def score(index: int) -> None:
        if not hasattr(thread, "buffer"):
            thread.buffer = np.empty(source.code_block_bytes, dtype=np.uint8)
        first, codes, scale = source.codes(form, index, thread.buffer)
        for start in range(0, len(codes), ROWS_AT_A_TIME):
            stop = min(start + ROWS_AT_A_TIME, len(codes))
            cosines[first + start : first + stop] = coded.cosines(codes[start:stop], scale[start:stop])

    with _one_core_a_thread(), ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for _ in threads.map(score, range(source.code_blocks)):
            pass
    return cosines


@contextmanager
def _one_core_a_thread() -> Iterator[None]:
    """Within: products of threads that begin there stay on their core."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)


def similarity_vectors(
    sources: Mapping[str, FeatureSource],
    weights: Mapping[str, float],
    form: str,
    rows: np.ndarray,
    dimension: int = SIMILARITY_DIMENSION,
) -> np.ndarray:
    """Vectors of some rows of a shard whose inner product tells how similar two rows are to the training.

    The product estimates the mean over checkpoints, weighted as in the influence, of the cosine of the rows' features.
    Features are folded to at most `dimension` numbers a checkpoint with random signs, so that those of a whole
    selection fit into memory; at a cosine of 0.95 the estimate's standard deviation is about 0.002 with 2,048 numbers.

    Args:
        sources: Checkpoint -> the shard's features there.
        weights: Checkpoint -> η̄_i, summing to 1 (`normalised_weights`).
        form: Direction form.
        rows: int (n,), rows of the shard, ascending.
        dimension: Numbers a row and checkpoint, at most.

    Returns:
        float32 (n, d); NaN for a row that is zero or not finite at a checkpoint.
    """
    parts = []
    for checkpoint, source in sources.items():
        folded = _folded_rows(source, form, rows, dimension)
        with np.errstate(divide="ignore", invalid="ignore"):
            parts.append(np.sqrt(weights[checkpoint]) * folded / np.linalg.norm(folded, axis=1, keepdims=True))
    return np.concatenate(parts, axis=1).astype(np.float32)


def _folded_rows(source: FeatureSource, form: str, rows: np.ndarray, dimension: int) -> np.ndarray:
    """Some rows of a source, folded: blocks are read on all cores at once, and only these rows decoded."""
    own = threading.local()

    def fold(index: int) -> list[np.ndarray]:
        if not hasattr(own, "buffer"):
            own.buffer = np.empty(source.code_block_bytes, dtype=np.uint8)
        first, codes, scale = source.codes(form, index, own.buffer)
        wanted = rows[(rows >= first) & (rows < first + len(codes))] - first
        parts = [wanted[start : start + ROWS_AT_A_TIME] for start in range(0, len(wanted), ROWS_AT_A_TIME)]
        return [
            _folded(decode(codes[part], scale[part], source.storage, source.dimension), dimension) for part in parts
        ]

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        return np.concatenate([part for parts in threads.map(fold, range(source.code_blocks)) for part in parts])


def _folded(features: np.ndarray, dimension: int) -> np.ndarray:
    """Features (n, k) as (n, at most `dimension`): blocks of coordinates with random signs, summed."""
    count, width = features.shape
    if width <= dimension:
        return features
    padded = np.zeros((count, -(-width // dimension) * dimension), dtype=np.float32)
    np.multiply(features, _signs(width), out=padded[:, :width])
    sums: np.ndarray = padded.reshape(count, -1, dimension).sum(axis=1)
    return sums


@lru_cache(maxsize=1)
def _signs(width: int) -> np.ndarray:
    return np.random.default_rng(0).choice(np.array([-1, 1], dtype=np.float32), width)


def score_table(rows: pl.DataFrame, scores: ScoreArrays) -> pl.DataFrame:
    """The score table of one task and one pool shard.

    Args:
        rows: One row per pool row of the shard, in order: example_id, source, shard, row, status ("ok" or the reason
            why the row has no score), and whatever else is to be kept, such as loss_tokens.
        scores: The task's part of `score_shard`.

    Returns:
        `rows` and, sorted by name, one `Array(Float32, J)` column per score column; null where status is not "ok".
    """
    usable = rows["status"] == "ok"
    columns = [
        pl.Series(name, values, dtype=pl.Array(pl.Float32, values.shape[1])) for name, values in sorted(scores.items())
    ]
    return rows.with_columns(pl.when(usable).then(column).otherwise(None).alias(column.name) for column in columns)


def row_statuses(pool_status: Sequence[str], feature_status: Mapping[str, np.ndarray]) -> list[str]:
    """Why each row of a shard is or is not scored: "ok", the pool's reason, or the first checkpoint's that refused it.

    Args:
        pool_status: "ok" or a reason code, per row.
        feature_status: Checkpoint -> uint8 (rows,) of `RowStatus`, in the order of the checkpoints.

    Returns:
        One word per row, `RowStatus` names in lower case.
    """
    from less_assets.method.gradients.features import RowStatus  # loads torch, which selection alone does not need

    names = {int(status): status.name.lower() for status in RowStatus}
    statuses = list(pool_status)
    for status in feature_status.values():
        for row in np.flatnonzero(status):
            if statuses[row] == "ok":
                statuses[row] = names[int(status[row])]
    return statuses
