"""From the losses before and after a training on the targets to scores."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.method.selection.target_tuning import relative_falls

losses = st.lists(st.tuples(st.floats(2**-8, 20, width=32), st.floats(0, 20, width=32)), min_size=1, max_size=20)


@given(losses)
def test_scores_are_shares_of_the_loss_before(pairs):
    before, after = np.array(pairs, dtype=np.float32).T
    scores = relative_falls(before, after)
    assert scores.dtype == np.float32
    assert scores == pytest.approx([1 - second / first for first, second in pairs], rel=1e-5, abs=1e-6)
    assert (scores <= 1).all()


@given(losses, st.floats(0.5, 8))
def test_losses_in_another_unit_give_the_same_order(pairs, factor):
    before, after = np.array(pairs, dtype=np.float64).T
    assert relative_falls(factor * before, factor * after) == pytest.approx(relative_falls(before, after), abs=1e-6)


def test_rows_without_two_losses_have_no_score():
    nan, inf = np.nan, np.inf
    scores = relative_falls(np.array([nan, 1.0, inf, 0.0, 2.0, 2.0]), np.array([1.0, nan, 1.0, 0.0, inf, 3.0]))
    assert np.isnan(scores[:5]).all()
    assert scores[5] == -0.5
