"""Greedy matching: the picks are those of trying every row, however many are compared at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method.selection.matching import Limits, match, vector_dimension


def unit_rows(count: int, dimension: int, seed: int, common: float = 0.5) -> np.ndarray:
    """Random unit rows with a common part, so that they repeat each other."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, dimension)) + common * rng.standard_normal(dimension)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def limits_of(count: int, budget: int, costs=None, quotas=None) -> Limits:
    costs = np.ones(count, dtype=np.int64) if costs is None else np.asarray(costs)
    return Limits(costs, budget, [f"source-{row % 2}" for row in range(count)], quotas or {})


def distance(rows: np.ndarray, target: np.ndarray) -> float:
    """The minimum over a ≥ 0 of |target − a · sum of rows|², by its closed form."""
    total = rows.sum(axis=0, dtype=np.float64)
    scale = max(0.0, total @ target / (total @ total))
    return float(((target - scale * total) ** 2).sum())


def by_trying_all(rows: np.ndarray, target: np.ndarray, budget: int) -> list[int]:
    """Each pick the row whose sum with those before points most along the target."""
    chosen: list[int] = []
    while len(chosen) < min(budget, len(rows)):
        cosines = np.full(len(rows), -np.inf)
        for row in set(range(len(rows))) - set(chosen):
            total = rows[[*chosen, row]].sum(axis=0, dtype=np.float64)
            cosines[row] = total @ target / np.linalg.norm(total)
        chosen.append(int(cosines.argmax()))
    return chosen


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.integers(3, 20), st.integers(1, 30), st.integers(0, 10**6))
def test_each_pick_is_the_best_of_all(count, dimension, budget, seed):
    rows = unit_rows(count, dimension, seed)
    target = np.random.default_rng(seed + 1).standard_normal(dimension)
    found = match(rows, rows.astype(np.float64) @ target, limits_of(count, budget))
    assert found.chosen == by_trying_all(rows, target, budget)
    assert found.passed_over == []


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_each_pick_leaves_the_smallest_distance_to_the_target(seed):
    rows = unit_rows(12, 8, seed)
    target = rows[:6].sum(axis=0) + np.random.default_rng(seed).standard_normal(8)
    chosen = match(rows, rows.astype(np.float64) @ target, limits_of(12, 6)).chosen
    for count in range(1, 7):
        others = set(range(12)) - set(chosen[: count - 1])
        possible = [distance(rows[[*chosen[: count - 1], row]], target) for row in others]
        assert distance(rows[chosen[:count]], target) <= min(possible) + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 40))
def test_comparing_few_rows_at_a_time_comes_nearly_as_close(seed, active):
    rows = unit_rows(300, 24, seed)
    target = np.random.default_rng(seed + 1).standard_normal(24)
    influence = rows.astype(np.float64) @ target
    exact = match(rows, influence, limits_of(300, 60))
    quick = match(rows, influence, limits_of(300, 60), active=active)
    assert len(set(quick.chosen)) == 60
    nearest, near = (distance(rows[found.chosen], target) for found in (exact, quick))
    whole = float(target @ target)
    assert whole - near >= 0.97 * (whole - nearest) - 1e-9 * whole


def test_a_row_that_repeats_another_comes_later_than_its_influence_says():
    rows = np.array([[1, 0.2, 0], [1, 0.2, 0], [1, 0.2, 0], [0, 0, 1]], dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    target = np.array([1.0, 0.0, 0.6])
    assert match(rows, rows.astype(np.float64) @ target, limits_of(4, 2)).chosen == [0, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(0, 30))
def test_a_budget_in_tokens_is_never_exceeded_and_quotas_hold(seed, budget, quota):
    rows = unit_rows(20, 6, seed)
    target = np.random.default_rng(seed).standard_normal(6)
    costs = np.random.default_rng(seed).integers(1, 9, 20)
    found = match(rows, rows @ target, limits_of(20, budget, costs, {"source-0": quota}))
    spent = costs[found.chosen].sum()
    assert spent <= budget
    assert sum(costs[row] for row in found.chosen if row % 2 == 0) <= quota
    assert all(row % 2 == 0 for row in found.passed_over)
    assert not set(found.chosen) & set(found.passed_over)
    # It ended because the next row did not fit, or because no row was left.
    assert len(found.chosen) + len(found.passed_over) == 20 or spent + costs.max() > budget


def test_rows_that_are_not_finite_are_never_chosen():
    rows = unit_rows(6, 5, 0)
    rows[2] = np.nan
    influence = np.array([1.0, np.nan, 5.0, 0.5, 0.4, 0.3])
    found = match(rows, influence, limits_of(6, 6))
    assert found.chosen[0] == 0
    assert set(found.chosen) == {0, 3, 4, 5}


def test_equal_rows_rank_by_their_number():
    rows = np.tile(unit_rows(1, 5, 0), (8, 1))
    assert match(rows, np.ones(8), limits_of(8, 5)).chosen == [0, 1, 2, 3, 4]
    assert match(rows, np.ones(8), limits_of(8, 5), active=4).chosen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("candidates", "checkpoints"), [(10, 4), (70_000, 4), (10**7, 4), (500_000, 1)])
def test_vectors_fit_into_their_memory(candidates, checkpoints):
    dimension = vector_dimension(candidates, checkpoints)
    assert 8 <= dimension <= 2048
    assert dimension in (8, 2048) or candidates * checkpoints * dimension * 4 <= 2**30
