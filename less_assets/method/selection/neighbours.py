"""What stands near a row in gradient space: target examples, and rows of the pool that teach the same.

Belongs here: cosines between features and the best of them, streamed. Not here: where features come from.

Nearness is a property of what a row teaches, not of its words: two phrasings of one question are near, two rows that
share a template but not the content are not.
"""

from collections.abc import Mapping, Sequence

import numpy as np

COMPARED_DIMENSIONS = 2048
"""Rows of the pool are compared on so many numbers of their sketches: any of them make a sketch themselves, whose
cosines are off by about 1/sqrt(2048) = 0.02, and near-duplicates are found at a fraction of the cost."""

NEAR_DUPLICATE = 0.9
"""Rows with at least this cosine are called near-duplicates."""


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows scaled to length one, float32; rows that are zero or not finite become zero."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    good = np.isfinite(norms) & (norms > 0)
    return np.where(good, features / np.where(good, norms, 1), 0).astype(np.float32)


def target_cosines(
    rows: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> np.ndarray:
    """Influence of each row on each single target example: cosines, weighted over the checkpoints.

    Their mean over a subtask's examples is the row's influence on it under `mean_cosine`.

    Args:
        rows: Checkpoint -> features of n rows, float32 (n, k).
        targets: Checkpoint -> features of m target examples, float32 (m, k).
        weights: Checkpoint -> normalised mean learning rate.

    Returns:
        float32 (n, m).
    """
    total = sum(
        np.float32(weights[name]) * (unit_rows(rows[name]) @ unit_rows(targets[name]).T) for name in sorted(rows)
    )
    return np.asarray(total, dtype=np.float32)


def best_places(scores: np.ndarray, count: int) -> np.ndarray:
    """Columns of the `count` highest scores of each row, best first (ties by column), int64 (n, ≤ count)."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


class NearestRows:
    """The rows of a stream that are nearest to each of n rows.

    Args:
        features: Features of the n rows, float32 (n, k).
        places: Where each of them stands in the stream, so that it is not its own neighbour.
        count: Neighbours kept for each.
        center: Subtracted from every feature before cosines are taken, float32 (k,): what all rows share (momentum).
    """

    def __init__(
        self, features: np.ndarray, places: Sequence[int], count: int, center: np.ndarray | None = None
    ) -> None:
        self._center = center
        self._units = unit_rows(self._part(features))
        self._places, self._count = np.asarray(places, dtype=np.int64), count
        self.cosines = np.full((len(features), count), -np.inf, dtype=np.float32)
        self.neighbours = np.full((len(features), count), -1, dtype=np.int64)

    def _part(self, features: np.ndarray) -> np.ndarray:
        part = features[:, :COMPARED_DIMENSIONS]
        return part if self._center is None else part - self._center[:COMPARED_DIMENSIONS]

    def offer(self, places: np.ndarray, block: np.ndarray, usable: np.ndarray) -> None:
        """Consider a block of the stream.

        Args:
            places: Place of each of its rows in the stream, int (b,), ascending.
            block: Features (b, k).
            usable: Which of its rows may be neighbours, bool (b,).
        """
        cosines = self._units @ unit_rows(self._part(block)).T
        cosines[:, ~usable] = -np.inf
        cosines[self._places[:, None] == places] = -np.inf
        # Most blocks hold no better neighbour for most rows: only those that do are sorted.
        better = np.flatnonzero(cosines.max(axis=1, initial=-np.inf) > self.cosines[:, -1])
        if not len(better):
            return
        joined = np.concatenate([self.cosines[better], cosines[better]], axis=1)
        stream = np.broadcast_to(places, (len(better), len(block)))
        names = np.concatenate([self.neighbours[better], stream], axis=1)
        best = best_places(joined, self._count)
        self.cosines[better] = np.take_along_axis(joined, best, axis=1)
        self.neighbours[better] = np.take_along_axis(names, best, axis=1)
