"""Which rows share a batch, and the padded tensors they become.

Belongs here: pure functions from lengths to batches and from encoded examples to tensors. Not here: tokenization
(`chat`), models, memory (the token budget is decided in `features`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch

from less_assets.method.data.chat import IGNORED, EncodedExample

FULL_TOKENS = 4096
"""Padded tokens from which a larger batch hardly makes an accelerator faster: then padding counts for more."""
SHORTEST = 0.9
"""Length of a row, as a part of the longest one, below which it does not enter a batch that is full in this sense."""


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[np.ndarray]:
    """Group rows of similar length so that every padded batch stays within a number of tokens.

    Rows are taken longest first (ties in row order), so the largest batch comes first and a budget that does not fit
    fails at once, not after hours. Behind `FULL_TOKENS`, a row that is much shorter than the longest one begins another
    batch. A pure function of its arguments: the batches, and with them the bytes of the features, do not depend on the
    machine.

    Args:
        lengths: Tokens of each row, (n,).
        token_budget: Upper bound of rows × longest row in a batch. A single row may exceed it.

    Returns:
        Index arrays (int64) into `lengths`; together they hold every row once.

    Raises:
        ValueError: If the budget is below 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, not {token_budget}")
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    descending = np.asarray(lengths, dtype=np.int64)[order]
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(descending[start]))
        alike = int(np.searchsorted(-descending, -SHORTEST * longest, side="right"))
        stop = start + max(1, min(token_budget // longest, max(FULL_TOKENS // longest, alike - start)))
        batches.append(order[start:stop])
        start = stop
    return batches


def padding_share(groups: Iterable[Sequence[int]], token_budget: int) -> float:
    """Share of padding among the tokens of all batches; 0 if there are none.

    Args:
        groups: Tokens of each row, group by group; a batch holds rows of one group.
        token_budget: As for `plan_batches`.
    """
    tokens = padded = 0
    for lengths in groups:
        for batch in plan_batches(lengths, token_budget):
            tokens += sum(lengths[row] for row in batch)
            padded += len(batch) * max(lengths[row] for row in batch)
    return 1 - tokens / padded if padded else 0.0


def collate(
    examples: Sequence[EncodedExample], pad_token_id: int, padding_side: Literal["left", "right"] = "right"
) -> dict[str, torch.Tensor]:
    """Pad encoded examples to the longest one.

    Args:
        examples: Rows with `input_ids` and `labels` (unshifted, −100 = no loss), each (n_i,).
        pad_token_id: Id that fills `input_ids`; padded labels are −100 and padded attention is 0.
        padding_side: Where the padding goes.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each int64 (rows, longest).
    """
    shape = (len(examples), max(len(example.input_ids) for example in examples))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        columns = slice(0, length) if padding_side == "right" else slice(shape[1] - length, shape[1])
        input_ids[row, columns] = example.input_ids
        attention_mask[row, columns] = 1
        labels[row, columns] = example.labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(labels),
    }
