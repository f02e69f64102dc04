"""Target directions seen against the pool: what all rows share counts little, what few rows teach counts much.

Belongs here: the mathematics on sketches. Not here: which rows are sampled, and files.

With û_1 … û_n the unit directions of n rows of the pool at a checkpoint and Σ = (1/n) Σ_i û_i û_iᵀ, a target direction
d becomes (Σ + λ·I)⁻¹ d: the influence function's inverse curvature (Koh and Liang 2017, arXiv 1703.04730), with the
second moment of the pool's own directions in place of the Hessian, as TRAK (Park et al. 2023, arXiv 2303.14186) and
others have it. Σ has rank n at most, so by the Woodbury identity, with U the matrix of the û_i (n × k),

    (Σ + λ·I)⁻¹ d = (d − Uᵀ (n·λ·I + U Uᵀ)⁻¹ U d) / λ,

which inverts a matrix of n rows in place of one of k.
"""

import numpy as np

SAMPLE_ROWS = 1024
"""Rows of the pool that Σ is estimated from."""


def precondition(directions: np.ndarray, sample: np.ndarray, damping: float) -> np.ndarray:
    """Multiply target directions by the regularised inverse second moment of the pool's unit directions.

    Each direction keeps its length, so that checkpoints and subtasks count as they do without.

    Args:
        directions: float32 (J, k), from `influence.target_directions`.
        sample: float32 (n, k), features of n rows; those that are zero or not finite are left out.
        damping: λ as a multiple of the mean of Σ's eigenvalues that are not zero, 1/n; more than 0.

    Returns:
        float32 (J, k).

    Raises:
        ValueError: No row of the sample is usable, or the damping is not positive.
    """
    if not damping > 0:
        raise ValueError(f"the damping must be positive; it is {damping}")
    # Norms row by row: a copy of the sample in float64 would take as much again as the sample.
    norms = np.array([np.linalg.norm(row.astype(np.float64)) for row in sample])
    usable = np.isfinite(norms) & (norms > 0)
    if not usable.any():
        raise ValueError("no row of the sample has a usable direction")
    units = sample[usable] / norms[usable, None].astype(np.float32)
    count = len(units)
    # n·λ = damping, since λ = damping / n.
    gram = (units @ units.T).astype(np.float64) + damping * np.eye(count)
    inside = np.linalg.solve(gram, (units @ directions.T).astype(np.float64))
    solved = directions.astype(np.float64) - inside.T @ units
    lengths = np.linalg.norm(directions, axis=1, keepdims=True) / np.linalg.norm(solved, axis=1, keepdims=True)
    scaled: np.ndarray = (solved * lengths).astype(np.float32)
    return scaled
