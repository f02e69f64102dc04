"""A little of what `make soak` tries a million times: see `fuzz.py`."""

import pytest
from hypothesis import HealthCheck, given, settings
from support import fuzz

PROPERTIES = fuzz.properties()
# Always the same inputs: news come from `make soak`, not from somebody's unrelated change.
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module", autouse=True)
def _leave_nothing():
    yield
    fuzz.clear_scratch()


@pytest.mark.parametrize("name", PROPERTIES)
def test_any_input_is_read_or_refused_by_the_projects_own_error(name):
    found = PROPERTIES[name]
    QUICK(given(found.inputs)(found.check))()


def test_edits_are_edits():
    assert fuzz.edited(b"abcd", [("flip", 0.5, 1, b"")]) == b"abad"
    assert fuzz.edited(b"abcd", [("drop", 0.25, 2, b"")]) == b"ad"
    assert fuzz.edited(b"abcd", [("insert", 1.0, 1, b"x"), ("cut", 0.2, 1, b"")]) == b"a"
    assert fuzz.edited(b"abcd", [("repeat", 0.0, 2, b"")]) == b"ababcd"
