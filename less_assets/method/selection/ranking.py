"""How scores rank the pool: from the stored score columns to the order in which rows are taken.

Belongs here: the one rule by which every selection, certificate and explanation ranks rows. Not here: budgets and what
a selection counts (selection.py), and where scores come from (influence.py, baselines.py).
"""

import numpy as np
import polars as pl


def score_matrix(column: pl.Series) -> np.ndarray:
    """A score column as float32 (n, J); null rows are NaN.

    Args:
        column: `Array(Float32, J)`, or plain floats where J is 1.
    """
    width = column.dtype.shape[0] if isinstance(column.dtype, pl.Array) else 1
    scores = np.full((len(column), width), np.nan, dtype=np.float32)
    scores[column.is_not_null().to_numpy()] = column.drop_nulls().to_numpy().reshape(-1, width)
    return scores
