"""Mixed selections: the chosen rows stay what they are, the rest is drawn from the others, and the budget holds."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.errors import PoolFormatError, ProjectFileError
from less_assets.method.selection.mixing import divide, mix
from less_assets.method.selection.ranking import Restraints
from less_assets.method.selection.selection import Budget, select_at_random


def pool(rows: int) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "example_id": [f"{row:032x}" for row in range(rows)],
            "source": [f"source-{row % 3}" for row in range(rows)],
            "shard": "shard",
            "row": range(rows),
            "status": "ok",
            "canonical": True,
            "loss_tokens": [1 + row % 7 for row in range(rows)],
        }
    )


@settings(max_examples=60)
@given(st.sampled_from(["rows", "tokens"]), st.integers(1, 10**6), st.floats(0.001, 0.999))
def test_a_divided_budget_is_whole(kind, amount, share):
    budget = Budget(kind, amount)
    if int(share * amount + 1e-9) == 0:
        with pytest.raises(ProjectFileError, match="mix"):
            divide(budget, share)
        return
    chosen, drawn = divide(budget, share)
    assert chosen.amount + drawn.amount == amount
    assert chosen.amount >= 1
    assert drawn.amount <= share * amount + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(12, 60), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_drawn_rows_follow_the_chosen_ones_and_are_others(rows, first, more, seed, named):
    shards = lambda: iter([pool(rows)])  # noqa: E731
    chosen = select_at_random(shards, Budget("rows", first), 3)
    sources = ["source-1"] if named else None
    mixed = mix(chosen, shards, Budget("rows", more), seed, sources=sources)
    drawn = mixed.table[first:]
    assert mixed.table[:first].equals(chosen.table)
    others = pool(rows).filter(~pl.col("example_id").is_in(chosen.table["example_id"].implode()))
    assert drawn.height == min(more, (others.filter(source="source-1") if named else others).height)
    assert mixed.table["example_id"].is_unique().all()
    assert mixed.table["rank"].to_list() == list(range(1, mixed.table.height + 1))
    if named:
        assert set(drawn["source"]) == {"source-1"}
    assert mixed.summary.rows == mixed.table.height
    assert mixed.summary.usable == chosen.summary.usable
    assert mixed.table.equals(mix(chosen, shards, Budget("rows", more), seed, sources=sources).table)


def test_what_both_parts_passed_over_is_counted_once():
    shards = lambda: iter([pool(30)])  # noqa: E731
    restraints = Restraints({"source-0": 0.15})
    chosen = select_at_random(shards, Budget("rows", 8), 0, restraints=restraints)
    mixed = mix(chosen, shards, Budget("rows", 8), 1, restraints=restraints)
    assert mixed.passed_over.height > chosen.passed_over.height > 0
    assert mixed.summary.removed["quota"] == mixed.passed_over.height
    assert mixed.table.filter(source="source-0").height == 2
    assert not set(mixed.passed_over["example_id"]) & set(mixed.table["example_id"])


def test_an_empty_rest_is_told():
    shards = lambda: iter([pool(9)])  # noqa: E731
    chosen = select_at_random(shards, Budget("rows", 9), 0)
    with pytest.raises(PoolFormatError):
        mix(chosen, shards, Budget("rows", 1), 1)
