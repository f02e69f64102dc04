"""What checks say of figures, without a run: the verdict, and a remedy that is not in force already."""

from types import SimpleNamespace

import pytest

from less_assets.steps.checks import check_dominance
from less_assets.steps.registry import ASSETS


def judged(aggregate: str | None, *rows: int, subtasks: int):
    """The verdict on a selection of so many rows of each of a task's first subtasks."""
    summaries = {
        "selected_subset": {"subtasks": {"bbh": {f"part-{place}": count for place, count in enumerate(rows)}}},
        "target_examples": {"subtasks": {f"part-{place}": 3 for place in range(subtasks)}},
    }
    lineage = SimpleNamespace(
        summary=lambda asset, partition: summaries[asset],
        project=SimpleNamespace(recipe=lambda key: SimpleNamespace(aggregate=aggregate)),
    )
    return check_dominance(lineage, "less|bbh", None, None)


@pytest.mark.parametrize("aggregate", ["round_robin", "max"])
def test_an_even_share_of_two_subtasks_does_not_dominate(aggregate):
    """An odd budget gave one of two subtasks 61 of 121 rows, which was more than half."""
    verdict = judged(aggregate, 61, 60, subtasks=2)
    assert verdict.passed
    assert verdict.said == "bbh/part-0 has won 61 of 121 selected rows (50%; an even share is 50%)."


@pytest.mark.parametrize(("won", "subtasks"), [(76, 2), (68, 3), (53, 27)])
def test_far_more_than_an_even_share_dominates(won, subtasks):
    rest = 100 - won
    assert not judged("max", won, rest, subtasks=subtasks).passed
    assert judged("max", won - 2, rest + 2, subtasks=subtasks).passed


def test_the_remedy_is_not_what_is_set_already():
    assert judged("max", 99, 1, subtasks=2).said.endswith("; `aggregate: round_robin` takes turns.")
    assert judged("round_robin", 99, 1, subtasks=2).said.endswith("look at quotas and `near_duplicates`.")


def test_a_recipe_without_an_aggregate_chooses_between_no_subtasks():
    assert judged(None, 100, subtasks=2).passed


@pytest.mark.parametrize("prefilter", [None, object()])
def test_the_check_of_a_prefilter_exists_only_with_one(prefilter):
    checks = ASSETS["selected_subset"].checks_in(SimpleNamespace(prefilter=prefilter))
    assert ("prefilter_loses_little" in [check.name for check in checks]) == (prefilter is not None)
