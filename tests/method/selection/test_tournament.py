"""The rule by which a tournament chooses: properties, and a brute-force oracle of its interval."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.method.evaluation.intervals import crossed_bootstrap
from less_assets.method.selection.tournament import ENOUGH_QUESTIONS, can_tell_apart, choose

NAMES = ["less", "rds", "bm25", "random"]
PRICES = {"less": 900.0, "rds": 100.0, "bm25": 0.0, "random": 0.0}


def losses(seed: int, effects: dict[str, float], *, seeds: int = 2, examples: int = 24, noise: float = 0.02):
    """Losses of pilots: examples differ much, candidates by their effect, and there is noise."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(2, 1, examples)
    return {name: hard + effect + noise * rng.normal(size=(seeds, examples)) for name, effect in effects.items()}


def chosen(values, *, higher_is_better: bool = False, prices=PRICES, replicates: int = 200):
    clusters = ["one"] * next(iter(values.values())).shape[1]
    return choose(
        values, clusters, prices, reference="random", higher_is_better=higher_is_better, replicates=replicates
    )


def test_interval_is_the_exact_distribution_over_all_draws_of_seeds_and_samples():
    """Three seeds, of which two are drawn, and three samples: every draw is written out and counted once."""
    values = np.array([[0.0, 1.0, 5.0], [2.0, 2.5, 3.0], [-1.0, 0.5, 9.0]])
    exact = [
        values[np.ix_(seeds, samples)].mean()
        for seeds in itertools.product(range(3), repeat=2)
        for samples in itertools.product(range(3), repeat=3)
    ]
    found = crossed_bootstrap(values, ["a"] * 3, replicates=60_000, confidence=0.8)
    assert found.mean == pytest.approx(values.mean())
    # Where the bound lies in the exact distribution: between the shares strictly below it and up to it.
    for bound, tail in ((found.low, 0.1), (found.high, 0.9)):
        assert np.mean(np.array(exact) < bound - 1e-9) <= tail + 0.01
        assert np.mean(np.array(exact) <= bound + 1e-9) >= tail - 0.01


def test_the_variance_between_seeds_is_not_underestimated():
    """Means of seeds alone: the bootstrap's variance is s²/S, the unbiased one, also for two seeds."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(60):
        means = rng.normal(size=2)
        found = crossed_bootstrap(np.repeat(means[:, None], 4, axis=1), ["a"] * 4, replicates=400, confidence=0.9)
        ratios.append((found.high - found.low) / abs(means[0] - means[1]))
    assert min(ratios) == pytest.approx(1), "each of two seeds is a replicate by itself"


def test_drawing_subtasks_widens_the_interval_and_sizes_weigh_samples_alike():
    values = np.repeat([[0.0, 1.0]], 2, axis=0).repeat([30, 10], axis=1)
    clustered = crossed_bootstrap(values, ["a"] * 30 + ["b"] * 10)
    alone = crossed_bootstrap(values, ["a"] * 40)
    assert clustered.mean == alone.mean == 0.25
    assert clustered.high - clustered.low > 2 * (alone.high - alone.low)


def test_bad_input_raises_and_nan_gives_nan():
    assert np.isnan(crossed_bootstrap(np.array([[1.0, np.nan]]), ["a", "a"]).high)
    for values, clusters in ((np.zeros((2, 0)), []), (np.zeros((2, 3)), ["a"]), (np.zeros(3), ["a"] * 3)):
        with pytest.raises(ValueError, match="seeds x samples"):
            crossed_bootstrap(values, clusters)
    with pytest.raises(ValueError, match="must be a candidate"):
        choose({"less": np.zeros((2, 3))}, ["a"] * 3, PRICES, reference="random", higher_is_better=False)
    with pytest.raises(ValueError, match="of one shape"):
        chosen({"less": np.zeros((2, 3)), "random": np.zeros((3, 3))})


def test_the_best_wins_where_it_is_ahead_of_all():
    found = chosen(losses(0, {"less": -0.5, "rds": -0.2, "bm25": 0.1, "random": 0.0}))
    assert (found.winner, found.why) == ("less", "less beats random and every other candidate")
    assert [standing.beats_reference for standing in found.standings] == [True, True, False, False]


def test_a_tie_goes_to_the_cheaper_one():
    values = losses(1, {"less": -0.5, "rds": -0.5, "random": 0.0}, noise=0.2)
    found = chosen(values, replicates=500)
    assert found.winner == "rds"
    dear_rds = chosen(values, prices=PRICES | {"rds": 5000.0}, replicates=500)
    assert dear_rds.winner == "less"
    assert {"cheaper" in found.why, "cheaper" in dear_rds.why} == {True}


def test_random_is_taken_where_nothing_beats_it_and_it_is_said():
    found = chosen(losses(2, {"less": 0.0, "rds": 0.3, "random": 0.0}, noise=0.2))
    assert found.winner == "random"
    assert found.why.startswith("no candidate beats random")


def test_two_seeds_that_disagree_beat_nothing():
    values = {"less": np.array([[-1.0] * 40, [0.1] * 40]), "random": np.zeros((2, 40))}
    assert chosen(values).winner == "random"
    values["less"][1] = -0.1
    assert chosen(values).winner == "less"


def test_a_diverged_candidate_never_wins_and_without_a_sound_random_nothing_does():
    values = losses(3, {"less": -0.5, "rds": -0.2, "random": 0.0})
    values["less"][0, 3] = np.nan
    assert chosen(values).winner == "rds"
    values["random"][0, 3] = np.inf
    assert chosen(values).winner == "random"


effects = st.fixed_dictionaries({name: st.floats(-0.3, 0.3) for name in NAMES})


@settings(max_examples=30, deadline=None)
@given(effects, st.integers(0, 9))
def test_the_choice_follows_the_rule_written_out(effects, seed):
    """The oracle forms every paired difference by itself and goes through the rule word by word."""
    values = losses(seed, effects, examples=9)
    found = chosen(values)

    def interval(first, second):
        return crossed_bootstrap(values[first] - values[second], ["one"] * 9, replicates=200)

    beating = [name for name in NAMES if name != "random" and interval(name, "random").high < 0]
    if not beating:
        assert found.winner == "random"
        return
    assert found.winner in beating
    leader = min(beating, key=lambda name: values[name].mean())
    tied = [name for name in beating if interval(leader, name).low <= 0 <= interval(leader, name).high]
    cheapest = min(PRICES[name] for name in {leader, *tied})
    assert PRICES[found.winner] == cheapest
    assert found.winner in {leader, *tied}
    for standing in found.standings:
        assert standing.beats_reference == (standing.candidate in beating)
        assert standing.mean == pytest.approx(values[standing.candidate].mean())


@settings(max_examples=20, deadline=None)
@given(effects, st.integers(0, 9), st.floats(-5, 5))
def test_what_all_share_and_the_sign_of_the_measure_change_nothing(effects, seed, shift):
    values = losses(seed, effects, examples=9)
    rng = np.random.default_rng(seed)
    hard = shift * rng.normal(size=9)  # how hard each example is
    scores = {name: -array for name, array in values.items()}
    first = chosen(values).winner
    assert chosen({name: array + hard for name, array in values.items()}).winner == first
    assert chosen(scores, higher_is_better=True).winner == first


def test_a_score_judges_only_where_it_can_tell_candidates_apart():
    rng = np.random.default_rng(0)

    def graded(right: float, questions: int = ENOUGH_QUESTIONS) -> np.ndarray:
        return (rng.permuted(np.tile(np.arange(questions), (2, 1)), axis=1) < right * questions).astype(float)

    assert can_tell_apart(graded(0.5), 0.0)
    assert not can_tell_apart(graded(0.5, ENOUGH_QUESTIONS - 1), 0.0)
    assert not can_tell_apart(graded(0.02), 0.0), "hardly anything is right"
    assert not can_tell_apart(graded(0.97), 0.0), "nearly everything is"
    assert not can_tell_apart(graded(0.3), 0.25), "what guessing among four choices gives"
    assert can_tell_apart(graded(0.6), 0.25)
