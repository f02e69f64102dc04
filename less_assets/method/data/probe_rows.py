"""Two short rows on which a loaded model is tried before it is trusted.

Belongs here: the rows. Not here: what is tried with them (`gradients.self_check`, `selection.baselines`).
"""

from __future__ import annotations

import numpy as np

from less_assets.method.data.chat import IGNORED, EncodedExample

LENGTHS = (13, 6)
"""Tokens of the rows; the shorter one is padded in a batch with the longer."""


def probe_rows(vocabulary: int, pad_token_id: int) -> list[EncodedExample]:
    """Rows of different length whose second half carries loss; no token is the padding.

    Args:
        vocabulary: Number of tokens that the model has embeddings for, at least 2.
        pad_token_id: The token that they leave out.
    """
    rows = []
    for index, length in enumerate(LENGTHS):
        tokens = (7 * np.arange(length) + 5 + 3 * index) % vocabulary
        tokens[tokens == pad_token_id] = (pad_token_id + 1) % vocabulary
        labels = np.where(np.arange(length) < length // 2, IGNORED, tokens)
        rows.append(EncodedExample(f"probe-{index}", tokens.astype(np.int32), labels.astype(np.int32)))
    return rows
