"""Rows whose directions together point where the targets do: each pick counts what the picks before it cover.

Belongs here: the greedy choice and the vectors it works on. Not here: which rows are candidates, and files.

Training on a set of rows moves the model along the sum of their directions; how far is the learning rate's matter. With
û_z the unit direction of row z and d the targets' direction, the set S misses the targets by

    F(S) = min over a ≥ 0 of |d − a · Σ_{z ∈ S} û_z|² = |d|² − max(0, <s, d>)² / |s|²,   s = Σ_{z ∈ S} û_z.

Each pick lowers F most: it is the row of highest <s + û, d> / |s + û|. At first that is the row's influence <û, d>;
later rows that repeat what was picked lengthen s and gain less. It is gradient matching (GRAD-MATCH, Killamsetty et al.
2021, arXiv 2103.00123) with one weight a for all rows in place of one for each, since training counts all rows alike.

Both products are sums over checkpoints weighted as influence is, so only cosines are needed: <û, d> is the stored
score, <û, û'> is estimated from folded sketches (`influence.similarity_vectors`).
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

VECTOR_BYTES = 3 * 2**28
"""Memory of the candidates' vectors; with many candidates their dimension falls."""
LARGEST_DIMENSION = 2048
"""Numbers a vector has for each checkpoint, at most."""
ACTIVE = 1024
"""Rows that are compared exactly at each pick: the best ones when all candidates were last compared."""
REACH = 3.0
"""Candidates in each of two orders (by mean, and in turn by subtask), as a multiple of the budget."""
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Limits:
    """When to stop, and what to pass over.

    Attributes:
        costs: int64 (n,), what each row takes of the budget: 1, or its loss tokens.
        budget: What may be taken in all; the choice ends before the first row that does not fit.
        sources: Source of each row, n of them.
        quotas: Source -> what may be taken of it; sources not named have no limit.
    """

    costs: np.ndarray
    budget: int
    sources: Sequence[str]
    quotas: Mapping[str, int]


@dataclass(frozen=True)
class Matching:
    """Rows by their number: those chosen, in order, and those that a quota ruled out when they came next."""

    chosen: list[int]
    passed_over: list[int]


def vector_dimension(candidates: int, checkpoints: int) -> int:
    """Numbers a vector may have for each checkpoint so that all vectors fit into `VECTOR_BYTES`."""
    return max(8, min(LARGEST_DIMENSION, VECTOR_BYTES // (4 * max(1, candidates) * checkpoints)))


def match(vectors: np.ndarray, influence: np.ndarray, limits: Limits, active: int = ACTIVE) -> Matching:
    """Choose rows greedily so that the sum of their directions points along the targets'.

    With up to `active` rows every pick is the best of all. With more, the best `active` rows are compared at each pick
    and the others again after at most a sixteenth more rows were picked: by then the sum has turned by little. Equal
    gains rank by row number. The result does not depend on the number of threads.

    Args:
        vectors: float32 (n, d), û_z; inner products are the rows' cosines.
        influence: float (n,), <û_z, d>; rows whose influence is not a number never are chosen.
        limits: When to stop.
        active: At least 2.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        return _match(vectors, np.asarray(influence, dtype=np.float64), limits, active)


def _match(vectors: np.ndarray, influence: np.ndarray, limits: Limits, active: int) -> Matching:
    count = len(vectors)
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    left = np.isfinite(influence) & np.isfinite(squares)
    inner, recent = np.zeros(count), np.zeros(vectors.shape[1])
    along = square = 0.0  # <s, d> and |s|²
    spent, quotas = 0, dict(limits.quotas)
    chosen: list[int] = []
    passed_over: list[int] = []
    while left.any():
        inner += _products(vectors, recent)
        recent[:] = 0
        rows = _best(_gains(along, square, influence, inner, squares, left), active)
        near, near_inner = vectors[rows], inner[rows]
        most = count if len(rows) == int(left.sum()) else max(1, min(len(chosen) // 16, active // 4))
        for _ in range(most):
            gains = _gains(along, square, influence[rows], near_inner, squares[rows], left[rows])
            best = int(gains.argmax())
            row = int(rows[best])
            if not left[row]:
                break
            left[row] = False
            cost, source = int(limits.costs[row]), limits.sources[row]
            if quotas.get(source, cost) < cost:
                passed_over.append(row)
                continue
            spent += cost
            if spent > limits.budget:
                return Matching(chosen, passed_over)
            if source in quotas:
                quotas[source] -= cost
            chosen.append(row)
            along += influence[row]
            square += 2 * near_inner[best] + squares[row]
            recent += vectors[row]
            near_inner += near @ vectors[row]
            if spent == limits.budget:
                return Matching(chosen, passed_over)
    return Matching(chosen, passed_over)


def _gains(
    along: float, square: float, influence: np.ndarray, inner: np.ndarray, squares: np.ndarray, left: np.ndarray
) -> np.ndarray:
    """<s + û, d> / |s + û| of every row; −∞ for those that cannot be chosen."""
    # Folded vectors are estimates: a sum that they make vanish is as long as a tenth of one row.
    lengths = np.sqrt(np.maximum(square + 2 * inner + squares, 0.01))
    return np.where(left, (along + influence) / lengths, -np.inf)


def _best(gains: np.ndarray, count: int) -> np.ndarray:
    """Row numbers of the highest gains, ascending, without rows that cannot be chosen."""
    if len(gains) > count:
        cut = np.partition(gains, len(gains) - count)[len(gains) - count]
        rows = np.flatnonzero(gains > cut)
        rows = np.sort(np.concatenate([rows, np.flatnonzero(gains == cut)[: count - len(rows)]]))
    else:
        rows = np.arange(len(gains))
    return rows[gains[rows] > -np.inf]


def _products(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Inner products float64 (n,) of all vectors with one, block by block on all cores, each block on one."""
    if not direction.any():
        return np.zeros(len(vectors))
    products, narrow = np.empty(len(vectors)), direction.astype(np.float32)

    def multiply(start: int) -> None:
        products[start : start + _BLOCK_ROWS] = vectors[start : start + _BLOCK_ROWS] @ narrow

    with ThreadPoolExecutor() as threads:
        for _ in threads.map(multiply, range(0, len(vectors), _BLOCK_ROWS)):
            pass
    return products
