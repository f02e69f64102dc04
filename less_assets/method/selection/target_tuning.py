"""Rows by how much a short training on the target examples helps with them: the rule of `strategy: target_tuned`.

Belongs here: from two losses of each row to its score. Not here: the training (`training/training.py`) and taking
losses (`baselines.embed`).

Train on Validation (Jain, Montanari and Sasoglu 2025, arXiv 2510.00386) turns the question of influence round: to first
order, a step on row z lowers the targets' loss by as much as a step on the targets lowers z's, since both are the inner
product of the two gradients. So one training on the targets and a forward pass before and after it take the place of a
gradient for each row. The fall is divided by the loss before, so that rows that are hard for everybody do not win by
their size alone.

That holds for short trainings only, so the project file's defaults are few steps: four passes in batches of 32 are 4
for GSM8K's 8 targets, 12 for BBH's 81, 36 for MMLU's 285. At a constant 1e-4, a usual rate for LoRA, losses change by
far more than rounding. The defaults are ours, chosen without a study; the paper's own settings were not at hand.
"""

import numpy as np


def relative_falls(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """By what share of it the loss of each row has fallen: (before − after) / before.

    Args:
        before: float (n,), mean loss of the base model over each row's loss tokens, nats.
        after: float (n,), the same after the training on the targets.

    Returns:
        float32 (n,), at most 1; below 0 where the loss has risen. NaN, which never ranks, where a loss is not finite or
        there was none before.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    usable = np.isfinite(first) & np.isfinite(second) & (first > 0)
    falls = np.full(first.shape, np.nan, dtype=np.float32)
    falls[usable] = (first[usable] - second[usable]) / first[usable]
    return falls
