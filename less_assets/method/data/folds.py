"""Target examples in folds: each part is left out once, and validates what the others have selected.

Belongs here: which example is in which fold. Not here: selecting without one, or taking losses.
"""

from collections.abc import Sequence

import numpy as np

from less_assets.errors import TargetFormatError


def folds_of(subtasks: Sequence[str], folds: int) -> np.ndarray:
    """The fold of each target example: folds are as equal as can be, in all and within every subtask.

    Args:
        subtasks: Subtask of each of m examples; equal labels in their order.
        folds: Number of folds, at least 2.

    Returns:
        int64 (m,), from 0.

    Raises:
        TargetFormatError: There are fewer examples than folds.
    """
    if len(subtasks) < folds:
        raise TargetFormatError(
            f"There are {len(subtasks)} target examples for {folds} folds.",
            where="validation.folds",
            fix=f"ask for at most {len(subtasks)} folds" if len(subtasks) > 1 else "give a file of validation examples",
        )
    fold_of = np.empty(len(subtasks), dtype=np.int64)
    # Counting goes on from one subtask to the next: with one example each, they are spread over the folds.
    fold_of[np.argsort(np.asarray(subtasks), kind="stable")] = np.arange(len(subtasks)) % folds
    return fold_of
