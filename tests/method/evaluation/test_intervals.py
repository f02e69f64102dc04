"""The bootstrap on data whose answer is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.evaluation.intervals import clustered_bootstrap

NUMBERS = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


@given(NUMBERS, st.integers(1, 4), st.sampled_from(["samples", "subtasks"]))
def test_interval_lies_within_the_values_and_is_reproducible(values, subtasks, average):
    clusters = [str(i % subtasks) for i in range(len(values))]
    first = clustered_bootstrap(np.array(values), clusters, average=average, replicates=50)
    assert first == clustered_bootstrap(np.array(values), clusters, average=average, replicates=50)
    assert min(values) - 1e-9 <= first.low <= first.high <= max(values) + 1e-9


def test_equal_values_have_an_interval_of_no_width():
    interval = clustered_bootstrap(np.full(20, 0.25), ["a"] * 20)
    assert (interval.mean, interval.low, interval.high) == (0.25, 0.25, 0.25)


def test_single_subtask_matches_the_normal_approximation():
    values = (np.arange(400) % 2).astype(float)
    interval = clustered_bootstrap(values, ["a"] * 400)
    assert interval.mean == 0.5
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.5 / 20, abs=0.01)
    assert interval.high == pytest.approx(0.5 + 1.96 * 0.5 / 20, abs=0.01)


def test_subtasks_that_differ_widen_the_interval():
    values = np.repeat([0.0, 0.0, 1.0, 1.0], 100)
    clustered = clustered_bootstrap(values, np.repeat(list("abcd"), 100).tolist())
    independent = clustered_bootstrap(values, ["a"] * 400)
    assert clustered.high - clustered.low > 3 * (independent.high - independent.low)


def test_averages_weigh_samples_or_subtasks():
    values, clusters = np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]
    assert clustered_bootstrap(values, clusters, average="samples").mean == 0.75
    assert clustered_bootstrap(values, clusters, average="subtasks").mean == 0.5


def test_nan_gives_nan_and_bad_input_raises():
    assert np.isnan(clustered_bootstrap(np.array([1.0, np.nan]), ["a", "a"]).low)
    with pytest.raises(ValueError, match="0 values"):
        clustered_bootstrap(np.array([]), [])
    with pytest.raises(ValueError, match="2 values for 1"):
        clustered_bootstrap(np.array([1.0, 2.0]), ["a"])
