"""Batches within a token budget, and padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.data.batching import FULL_TOKENS, SHORTEST, collate, padding_share, plan_batches
from less_assets.method.data.chat import EncodedExample

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 2000))
def test_every_row_is_in_exactly_one_batch_and_batches_fit_the_budget(lengths, budget):
    batches = plan_batches(lengths, budget)
    assert sorted(np.concatenate([[], *batches]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


@given(LENGTHS, st.integers(1, 2000))
def test_the_longest_rows_come_first(lengths, budget):
    order = [lengths[row] for batch in plan_batches(lengths, budget) for row in batch]
    assert order == sorted(lengths, reverse=True)


def test_rows_of_equal_length_keep_their_order():
    assert [batch.tolist() for batch in plan_batches([5, 5, 5, 5, 5], 10)] == [[0, 1], [2, 3], [4]]


@given(st.lists(st.integers(1, 1000), max_size=200), st.integers(FULL_TOKENS, 20 * FULL_TOKENS))
def test_a_large_budget_fills_batches_with_rows_of_like_length(lengths, budget):
    for batch in plan_batches(lengths, budget):
        longest = lengths[batch[0]]
        for place, row in enumerate(batch):
            assert lengths[row] >= SHORTEST * longest or (place + 1) * longest <= FULL_TOKENS
    assert padding_share([lengths], 1) == pytest.approx(0), "each row alone"


def test_padding_is_counted_over_all_batches():
    assert padding_share([[4, 2], [3, 1, 1]], 100) == pytest.approx(1 - 11 / (8 + 9))
    assert padding_share([[4, 2], [3, 1, 1]], 4) == pytest.approx(1 - 11 / (4 + 2 + 3 + 2))
    assert padding_share([[], []], 10) == 0


def test_a_budget_below_one_is_refused():
    with pytest.raises(ValueError, match="token_budget"):
        plan_batches([1], 0)


def row(ids, labels):
    return EncodedExample("row", np.array(ids, np.int32), np.array(labels, np.int32))


@pytest.mark.parametrize(
    ("side", "ids", "labels", "mask"),
    [
        ("right", [[1, 2, 3], [4, 9, 9]], [[-100, 2, 3], [4, -100, -100]], [[1, 1, 1], [1, 0, 0]]),
        ("left", [[1, 2, 3], [9, 9, 4]], [[-100, 2, 3], [-100, -100, 4]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding_carries_neither_attention_nor_loss(side, ids, labels, mask):
    batch = collate([row([1, 2, 3], [-100, 2, 3]), row([4], [4])], pad_token_id=9, padding_side=side)
    assert batch["input_ids"].tolist() == ids
    assert batch["labels"].tolist() == labels
    assert batch["attention_mask"].tolist() == mask
