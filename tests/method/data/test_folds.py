"""Folds: every example is left out once, and all folds are alike."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from less_assets.errors import TargetFormatError
from less_assets.method.data.folds import folds_of


@given(st.lists(st.sampled_from("abcde"), min_size=2, max_size=60), st.integers(2, 8))
def test_folds_are_equal_in_all_and_within_each_subtask(subtasks, folds):
    if len(subtasks) < folds:
        with pytest.raises(TargetFormatError, match=str(len(subtasks))):
            folds_of(subtasks, folds)
        return
    found = folds_of(subtasks, folds).tolist()
    assert set(found) == set(range(folds))
    sizes = Counter(found)
    assert max(sizes.values()) - min(sizes.values()) <= 1
    for label in set(subtasks):
        own = Counter(fold for fold, subtask in zip(found, subtasks, strict=True) if subtask == label)
        counts = [own[fold] for fold in range(folds)]
        assert max(counts) - min(counts) <= 1


def test_three_worked_examples_of_each_subtask_make_three_folds_of_all_subtasks():
    found = folds_of(["x", "y", "x", "y", "x", "y"], 3)
    assert found.tolist() == [0, 0, 1, 1, 2, 2]
