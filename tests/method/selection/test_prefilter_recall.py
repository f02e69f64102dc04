"""What a prefilter loses: the estimate is right where all is known, and else its interval covers the truth."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method.selection.prefilter import drawn_by_id, estimate_recall
from less_assets.method.selection.ranking import Queue, queues_of, select_from_sample


def ranked(scores: np.ndarray, queues: list[Queue], rows: int, places: np.ndarray) -> np.ndarray:
    """Places in the pool of what is selected of some of its rows."""
    selected = select_from_sample(scores[places], queues, rows)
    taken: np.ndarray = places[selected["example_id"].cast(pl.Int64).to_numpy()]
    return taken


def prefiltered(
    scores: np.ndarray, kept: np.ndarray, rows: int, aggregate: str
) -> tuple[float, np.ndarray, list[Queue]]:
    """The true recall of a selection from the kept rows, and what was selected, by which orders."""
    queues = queues_of({"task": [(str(column), column) for column in range(scores.shape[1])]}, aggregate)
    whole = ranked(scores, queues, rows, np.arange(len(scores)))
    still = ranked(scores, queues, rows, np.flatnonzero(kept))
    missed = np.setdiff1d(whole, still)
    assert not kept[missed].any(), "a kept row that the whole pool's selection has is selected still"
    return 1 - len(missed) / rows, still, queues


pools = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=60, deadline=None)
@given(pools, st.sampled_from(["max", "mean", "round_robin"]), st.integers(1, 4), st.integers(20, 60))
def test_a_sample_of_all_dropped_rows_gives_the_true_recall(random, aggregate, subtasks, size):
    scores = random.normal(size=(size, subtasks)).astype(np.float32)
    kept = random.random(size) < 0.6
    if kept.sum() < 8:
        return
    recall, still, queues = prefiltered(scores, kept, 8, aggregate)
    dropped = int((~kept).sum())
    found = estimate_recall(scores[still], scores[~kept], queues, dropped=dropped, sampled=dropped)
    assert found.low == found.estimate == found.high == pytest.approx(recall)


@pytest.mark.parametrize("aggregate", ["max", "round_robin"])
@pytest.mark.parametrize(("related", "spread"), [(0.95, 0.5), (0.6, 0.5), (0.8, 3.0)])
def test_the_interval_covers_the_true_recall(aggregate, related, spread):
    """Prefilters from good to poor, which know nothing of the first subtask; its scores are wider or narrower."""
    random = np.random.default_rng(5)
    covered, errors, widths, trials = 0, [], [], 100
    for _ in range(trials):
        scores = random.normal(size=(1000, 3)).astype(np.float32)
        scores[:, 0] *= spread
        cheap = related * scores[:, 1:].max(axis=1) + np.sqrt(1 - related**2) * random.normal(size=1000)
        kept = cheap >= np.quantile(cheap, 0.7)
        recall, still, queues = prefiltered(scores, kept, 60, aggregate)
        dropped = scores[~kept]
        sample = random.choice(dropped, 300, replace=False)
        found = estimate_recall(scores[still], sample, queues, dropped=len(dropped), sampled=300)
        covered += found.low - 1e-9 <= recall <= found.high + 1e-9
        errors.append(found.estimate - recall)
        widths.append(found.high - found.low)
    assert covered >= 0.95 * trials
    assert abs(np.mean(errors)) < 0.05, "on the average the estimate is near the truth"
    assert np.mean(widths) < 0.5, "an interval of everything says nothing"


@settings(deadline=None)
@given(pools, st.integers(1, 80), st.integers(1, 80), st.integers(1, 20))
def test_the_estimate_lies_within_its_interval(random, dropped, sampled, selected):
    sampled = min(sampled, dropped)
    queues = queues_of({"task": [("a", 0)]}, "max")
    scores = random.normal(size=(selected + sampled, 1)).astype(np.float32)
    found = estimate_recall(scores[:selected], scores[selected:], queues, dropped=dropped, sampled=sampled)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_sampled_rows_without_a_score_are_not_missed():
    queues = queues_of({"task": [("a", 0)]}, "max")
    selected, sample = np.array([[0.5], [0.4]], dtype=np.float32), np.array([[0.9], [np.nan]], dtype=np.float32)
    assert estimate_recall(selected, sample, queues, dropped=2, sampled=2).estimate == 0.5
    assert estimate_recall(selected, sample[1:], queues, dropped=2, sampled=2).estimate == 1


def test_a_sample_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 of 0 rows sampled"):
        estimate_recall(np.ones((3, 1)), np.ones((0, 1)), queues_of({"t": [("a", 0)]}, "max"), dropped=5, sampled=0)


def test_a_rows_fate_in_the_sample_depends_on_its_id_alone():
    ids = [f"{number:032x}" for number in range(4000)]
    drawn = drawn_by_id(ids, 0.25)
    assert drawn.mean() == pytest.approx(0.25, abs=0.03)
    assert drawn_by_id(ids[1000:], 0.25).tolist() == drawn[1000:].tolist()
    assert not (drawn & ~drawn_by_id(ids, 0.5)).any(), "a larger share has the same rows, and more"
    assert drawn_by_id(ids, 2.0).all()
