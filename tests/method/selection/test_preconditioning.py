"""Preconditioning by Woodbury is the inverse written out, in every shape of sample."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method.selection.preconditioning import precondition


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(2, 24), st.integers(1, 4), st.floats(0.05, 20), st.integers(0, 10**6))
def test_it_is_the_inverse_of_the_second_moment(rows, dimension, targets, damping, seed):
    rng = np.random.default_rng(seed)
    sample = (rng.standard_normal((rows, dimension)) * rng.uniform(0.1, 10, (rows, 1))).astype(np.float32)
    directions = rng.standard_normal((targets, dimension)).astype(np.float32)
    units = sample.astype(np.float64) / np.linalg.norm(sample, axis=1, keepdims=True)
    moment = units.T @ units / rows + damping / rows * np.eye(dimension)
    expected = np.linalg.solve(moment, directions.T.astype(np.float64)).T
    expected *= (np.linalg.norm(directions, axis=1) / np.linalg.norm(expected, axis=1))[:, None]
    np.testing.assert_allclose(precondition(directions, sample, damping), expected, rtol=2e-3, atol=2e-3)


def test_what_all_rows_share_counts_less():
    rng = np.random.default_rng(0)
    shared = np.eye(20)[0]
    sample = (3 * shared + 0.3 * rng.standard_normal((200, 20))).astype(np.float32)
    direction = (shared + np.eye(20)[1])[None].astype(np.float32)
    found = precondition(direction, sample, 1.0)[0]
    assert abs(found[0]) < 0.2 * abs(found[1])
    # So much damping leaves the direction as it was.
    np.testing.assert_allclose(precondition(direction, sample, 1e6)[0], direction[0], atol=1e-3)


def test_rows_without_a_direction_are_left_out():
    rng = np.random.default_rng(1)
    sample, direction = rng.standard_normal((6, 9)).astype(np.float32), rng.standard_normal((1, 9)).astype(np.float32)
    broken = np.concatenate([sample, np.zeros((1, 9)), np.full((1, 9), np.nan)]).astype(np.float32)
    np.testing.assert_array_equal(precondition(direction, broken, 1.0), precondition(direction, sample, 1.0))
    with pytest.raises(ValueError, match="usable"):
        precondition(direction, np.zeros((2, 9), dtype=np.float32), 1.0)
    with pytest.raises(ValueError, match="damping"):
        precondition(direction, sample, 0.0)
