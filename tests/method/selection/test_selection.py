"""Selection: exactly the rows that sorting everything would give, however the pool is cut and ordered."""

import itertools
from collections import defaultdict

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from less_assets.errors import PoolFormatError, ProjectFileError
from less_assets.method.selection.ranking import (
    AGGREGATES,
    PASSED_OVER_SCHEMA,
    Restraints,
    queues_of,
    select_from_sample,
)
from less_assets.method.selection.selection import (
    SELECTION_SCHEMA,
    Budget,
    Candidates,
    select_all,
    select_at_random,
    select_by_score,
)

LABELS = ("alpha", "beta", "gamma")


def make_pool(scores: np.ndarray, seed: int = 0) -> pl.DataFrame:
    """Rows with ids unrelated to their order; two sources; loss tokens between 1 and 9."""
    rng = np.random.default_rng(seed)
    rows = len(scores)
    return pl.DataFrame(
        {
            "example_id": [f"{number:032x}" for number in rng.permutation(rows * 3)[:rows]],
            "source": [f"source-{row % 2}" for row in range(rows)],
            "shard": [f"source-{row % 2}-00000" for row in range(rows)],
            "row": np.arange(rows),
            "status": ["ok"] * rows,
            "canonical": [True] * rows,
            "loss_tokens": rng.integers(1, 10, rows).astype(np.int32),
            "adamw.mean_cosine": pl.Series(scores, dtype=pl.Array(pl.Float32, scores.shape[1])),
        }
    )


def candidates(pool: pl.DataFrame, cuts: int = 1, task: str = "bbh") -> Candidates:
    size = -(-len(pool) // cuts)
    width = pool.schema["adamw.mean_cosine"].shape[0]
    return Candidates(task, "adamw.mean_cosine", LABELS[:width], lambda: iter(pool.iter_slices(size)))


def brute_force(pools: list[pl.DataFrame], budget: Budget, aggregate: str) -> list[tuple[str, float, str]]:
    """(id, score, subtask) by sorting everything."""
    members, costs = [], {}
    for pool in pools:
        scores = pool["adamw.mean_cosine"].to_numpy()
        ids = pool["example_id"].to_list()
        costs.update(zip(ids, pool["loss_tokens"].to_list(), strict=True))
        if aggregate == "round_robin":
            queues = [
                sorted(((-float(row[place]), id_, LABELS[place]) for row, id_ in zip(scores, ids, strict=True)))
                for place in range(scores.shape[1])
            ]
        else:
            reduce = {"max": lambda row: row.max(), "mean": lambda row: np.float32(row.mean(dtype=np.float64))}[
                aggregate
            ]
            queues = [
                sorted(
                    (-float(reduce(row)), id_, LABELS[int(row.argmax())]) for row, id_ in zip(scores, ids, strict=True)
                )
            ]
        members.append(queues)
    limit = {"fraction": max(1, int(budget.amount * len(costs) + 1e-9)), "rows": budget.amount}.get(budget.kind)
    chosen, taken, spent, turn = [], set(), 0, defaultdict(int)
    while len(taken) < len(costs):
        for place, queues in enumerate(members):
            queue = queues[turn[place] % len(queues)]
            turn[place] += 1
            left = [entry for entry in queue if entry[1] not in taken]
            if not left:
                continue
            negative, id_, subtask = left[0]
            spent += costs[id_]
            if spent > budget.amount if limit is None else len(taken) == limit:
                return chosen
            taken.add(id_)
            chosen.append((id_, -negative, subtask))
    return chosen


few_values = st.sampled_from([-0.5, 0.0, 0.25, 0.5])  # many ties
score_lists = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(few_values, min_size=width, max_size=width), min_size=1, max_size=25)
)
budgets = st.one_of(
    st.builds(Budget, st.just("rows"), st.integers(1, 30)),
    st.builds(Budget, st.just("fraction"), st.floats(0.01, 1.0)),
    st.builds(Budget, st.just("tokens"), st.integers(9, 120)),
)


@settings(max_examples=150)
@given(score_lists, budgets, st.sampled_from(AGGREGATES), st.integers(1, 6))
def test_selection_equals_sorting_everything(scores, budget, aggregate, cuts):
    pool = make_pool(np.asarray(scores, np.float32))
    chosen = select_by_score([candidates(pool, cuts)], budget, aggregate).table
    found = list(zip(chosen["example_id"], chosen["score"], chosen["subtask"], strict=True))
    assert found == brute_force([pool], budget, aggregate)
    assert chosen["rank"].to_list() == list(range(1, len(chosen) + 1))
    assert chosen.schema == SELECTION_SCHEMA


@settings(max_examples=60)
@given(score_lists, budgets, st.sampled_from(AGGREGATES), st.integers(0, 9))
def test_several_tasks_take_turns(scores, budget, aggregate, seed):
    scores = np.asarray(scores, np.float32)
    first = make_pool(scores)
    second = make_pool(np.random.default_rng(seed).permutation(scores))
    members = [candidates(first, task="bbh"), candidates(second, cuts=2, task="gsm8k")]
    chosen = select_by_score(members, budget, aggregate)
    found = list(zip(chosen.table["example_id"], chosen.table["score"], chosen.table["subtask"], strict=True))
    assert found == brute_force([first, second], budget, aggregate)
    if len(found) > 1:
        assert chosen.table["task"].to_list()[:2] == ["bbh", "gsm8k"]
    assert sum(sum(counts.values()) for counts in chosen.summary.rows_per_subtask.values()) == len(found)


@settings(max_examples=40)
@given(st.permutations(range(12)), st.integers(1, 5), st.sampled_from(AGGREGATES))
def test_order_and_cut_of_the_pool_do_not_matter(order, cuts, aggregate):
    pool = make_pool(np.random.default_rng(1).integers(0, 4, (12, 3)).astype(np.float32))
    for budget in (Budget("rows", 5), Budget("tokens", 30)):
        expected = select_by_score([candidates(pool)], budget, aggregate)
        found = select_by_score([candidates(pool[list(order)], cuts)], budget, aggregate)
        assert found.table.equals(expected.table)
        assert found.summary == expected.summary
        expected = select_at_random(lambda: [pool], budget, 7)
        assert select_at_random(candidates(pool[list(order)], cuts).shards, budget, 7).table.equals(expected.table)


@pytest.mark.parametrize("budget", [Budget("rows", 700), Budget("fraction", 0.3), Budget("tokens", 3000)])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_many_shards_keep_only_what_could_be_taken(budget, aggregate):
    pool = make_pool(
        np.random.default_rng(3).standard_normal((20_000 if budget.kind != "fraction" else 3000, 3)).astype(np.float32)
    )
    streamed = select_by_score([candidates(pool, cuts=40)], budget, aggregate).table
    assert streamed.equals(select_by_score([candidates(pool)], budget, aggregate).table)
    assert len(streamed) == {"rows": 700, "fraction": 900}.get(budget.kind, len(streamed))
    assert streamed["loss_tokens"].sum() <= 3000 or budget.kind != "tokens"


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 3), min_size=1, max_size=40), st.integers(1, 45), st.data())
def test_a_sample_in_memory_is_ranked_as_the_pool_is(scores, rows, data):
    aggregate = data.draw(st.sampled_from(AGGREGATES))
    matrix = np.array(scores, dtype=np.float32)
    pool = make_pool(matrix).with_columns(  # ids in the order of the rows, so that equal scores rank alike
        pl.int_range(pl.len()).cast(pl.String).str.zfill(3).alias("example_id")
    )
    expected = select_by_score([candidates(pool)], Budget("rows", rows), aggregate).table
    queues = queues_of({"bbh": [(label, column) for column, label in enumerate(LABELS)]}, aggregate)
    sampled = select_from_sample(matrix, queues, rows)
    assert sampled["example_id"].cast(int).to_list() == expected["example_id"].cast(int).to_list()
    assert sampled["score"].to_list() == expected["score"].to_list()
    if aggregate == "round_robin":
        assert sampled["subtask"].to_list() == expected["subtask"].to_list()


def test_nan_quarantined_and_duplicate_rows_are_never_selected_and_are_counted():
    scores = np.array([[9, 9], [8, 8], [7, 7], [6, 6], [5, np.nan], [4, 4]], np.float32)
    pool = make_pool(scores).with_columns(
        status=pl.Series(["ok", "zero_gradient", "ok", "ok", "ok", "invalid_json"]),
        canonical=pl.Series([True, True, False, True, True, False]),
    )
    pool = pool.with_columns(
        pl.when(pl.col("status") == "ok").then("adamw.mean_cosine").otherwise(None).alias("adamw.mean_cosine"),
    )
    for aggregate in AGGREGATES:
        found = select_by_score([candidates(pool, cuts=3)], Budget("fraction", 1.0), aggregate)
        assert found.table["row"].to_list() == [0, 3]
        assert found.summary.usable == 2
        assert found.summary.removed == {"zero_gradient": 1, "invalid_json": 1, "duplicate": 1, "no_score": 1}


def test_the_summary_says_who_got_what_and_where_the_cut_is():
    scores = np.array([[9, 0], [0, 8], [7, 0], [6, 1]], np.float32)
    summary = select_by_score([candidates(make_pool(scores))], Budget("rows", 3), "max").summary
    assert (summary.rows, summary.usable) == (3, 4)
    assert summary.rows_per_source == {"source-0": 2, "source-1": 1}
    assert summary.rows_per_subtask == {"bbh": {"alpha": 2, "beta": 1}}
    assert summary.cut_scores == {"bbh": {"alpha": 7.0, "beta": 8.0}}


def greedy(pool, budget, aggregate, quotas, threshold, vectors):
    """Ids taken and (id, reason, kept) passed over, row by row over fully sorted queues."""
    queue_ids = [[id_ for id_, *_ in queue] for queue in sorted_queues(pool, aggregate)]
    rows = {row["example_id"]: row for row in pool.iter_rows(named=True)}
    limit = budget.rows_of(len(pool))
    whole = budget.amount if limit is None else limit
    left = {source: int(share * whole + 1e-9) for source, share in quotas.items()}
    taken, passed, spent, turn = [], [], 0, 0
    live = list(queue_ids)
    while live:
        queue = live[0]
        gone = {*taken, *(id_ for id_, *_ in passed)}
        id_ = next((id_ for id_ in queue if id_ not in gone), None)
        if id_ is None:
            live.pop(0)
            continue
        row = rows[id_]
        cost = row["loss_tokens"] if limit is None else 1
        if row["source"] in left and left[row["source"]] < cost:
            passed.append((id_, "quota", None))
            continue
        similar = [(float(vectors[other] @ vectors[id_]), other) for other in taken]
        if threshold is not None and similar and max(similar)[0] >= threshold:
            passed.append((id_, "near_duplicate", None))
            continue
        spent += cost
        if limit is None and spent > budget.amount:
            break
        taken.append(id_)
        if row["source"] in left:
            left[row["source"]] -= cost
        if len(taken) == limit:
            break
        live.append(live.pop(0))
        turn += 1
    return taken, passed


def sorted_queues(pool, aggregate):
    scores = pool["adamw.mean_cosine"].to_numpy()
    ids = pool["example_id"].to_list()
    if aggregate == "round_robin":
        columns = [scores[:, place] for place in range(scores.shape[1])]
    else:
        columns = [scores.max(axis=1) if aggregate == "max" else scores.mean(axis=1, dtype=np.float64).astype("f4")]
    return [[(id_,) for _, id_ in sorted(zip((-column).tolist(), ids, strict=True))] for column in columns]


@settings(max_examples=120, deadline=None)
@given(
    score_lists,
    budgets,
    st.sampled_from(AGGREGATES),
    st.dictionaries(st.sampled_from(["source-0", "source-1"]), st.sampled_from([0.3, 0.5, 1.0])),
    st.sampled_from([None, 0.5, 0.95]),
    st.integers(1, 4),
)
def test_rows_are_passed_over_as_one_by_one(scores, budget, aggregate, quotas, threshold, cuts):
    pool = make_pool(np.asarray(scores, np.float32))
    angles = np.random.default_rng(0).integers(0, 6, len(pool)) * 0.4
    vectors = dict(zip(pool["example_id"], np.stack([np.cos(angles), np.sin(angles)], 1).astype("f4"), strict=True))
    restraints = Restraints(quotas, threshold, lambda rows: np.stack([vectors[id_] for id_ in rows["example_id"]]))
    taken, passed = greedy(pool, budget, aggregate, quotas, threshold, vectors)
    if not taken:
        with pytest.raises(ProjectFileError):
            select_by_score([candidates(pool, cuts)], budget, aggregate, restraints)
        return
    found = select_by_score([candidates(pool, cuts)], budget, aggregate, restraints)
    assert found.table["example_id"].to_list() == taken
    assert found.passed_over.schema == PASSED_OVER_SCHEMA
    assert found.passed_over.select("example_id", "reason").rows() == [entry[:2] for entry in passed]
    for row in found.passed_over.iter_rows(named=True):
        if row["reason"] == "near_duplicate":
            assert row["kept"] in taken
            assert row["similarity"] >= threshold
            assert row["similarity"] == pytest.approx(
                float(vectors[row["kept"]] @ vectors[row["example_id"]]), abs=1e-5
            )
    assert sum(found.summary.removed.values()) == len(passed)


def test_far_more_near_duplicates_than_the_budget_are_passed_over():
    """Queues hold twice the budget at first: here they must grow several times."""
    scores = np.linspace(1, 0, 3000, dtype=np.float32)[:, None]
    pool = make_pool(scores)
    places = dict(zip(pool["example_id"], range(3000), strict=True))

    def vectors(rows):
        angle = np.array([places[id_] // 1000 for id_ in rows["example_id"]])
        return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)

    found = select_by_score([candidates(pool, 7)], Budget("rows", 3), "max", Restraints({}, 0.99, vectors))
    assert found.table["row"].to_list() == [0, 1000, 2000]
    assert found.summary.removed == {"near_duplicate": 1998}
    assert found.passed_over["kept"].unique().sort().to_list() == sorted(found.table["example_id"][:2].to_list())


def test_draws_keep_to_quotas_and_weights():
    pool = make_pool(np.zeros((400, 1), np.float32))
    quotas = Restraints({"source-0": 0.1})
    found = select_at_random(lambda: [pool], Budget("rows", 100), 0, restraints=quotas)
    assert found.summary.rows_per_source == {"source-0": 10, "source-1": 90}
    weighted = select_at_random(
        lambda: [pool], Budget("rows", 50), 0, log_weights=lambda rows: np.where(rows["row"] < 100, 0.0, -1000.0)
    )
    assert weighted.table["row"].max() < 100
    assert weighted.table["score"].null_count() == 50


def test_quotas_that_allow_nothing_are_an_error():
    pool = make_pool(np.zeros((4, 1), np.float32)).with_columns(source=pl.lit("only"))
    with pytest.raises(ProjectFileError, match="quotas"):
        select_by_score([candidates(pool)], Budget("rows", 2), "max", Restraints({"only": 0.1}))


def test_a_plain_column_of_scores_will_do():
    pool = make_pool(np.zeros((4, 1), np.float32)).with_columns(bm25=pl.Series([0.5, 2.0, None, 1.0], dtype=pl.Float64))
    member = Candidates("bbh", "bm25", ("bbh",), lambda: [pool])
    assert select_by_score([member], Budget("rows", 3), "max").table["row"].to_list() == [1, 3, 0]


def test_random_selection_is_uniform_seeded_and_stable_when_the_pool_grows():
    pool = make_pool(np.zeros((2000, 1), np.float32))
    budget = Budget("rows", 1000)
    first = select_at_random(lambda: [pool], budget, 0).table["row"]
    assert not first.equals(select_at_random(lambda: [pool], budget, 1).table["row"])
    assert abs(first.mean() - 1000) < 60
    smaller = select_at_random(lambda: [pool.head(1900)], Budget("rows", 1900), 0).table["row"].to_list()
    larger = select_at_random(lambda: [pool], Budget("rows", 2000), 0).table["row"].to_list()
    assert [row for row in larger if row < 1900] == smaller


def test_draws_of_different_streams_are_independent_at_equal_seeds():
    pool = make_pool(np.zeros((4000, 1), np.float32))
    budget = Budget("rows", 1000)
    drawn = {
        stream: set(select_at_random(lambda: [pool], budget, 0, stream=stream).table["row"])
        for stream in ("", "random", "dsir")
    }
    weighted = select_at_random(
        lambda: [pool], budget, 0, stream="length_matched", log_weights=lambda rows: np.zeros(len(rows))
    )
    drawn["length_matched"] = set(weighted.table["row"])
    for first, second in itertools.combinations(drawn, 2):
        # Independent draws of a quarter share a sixteenth of the pool: 250 ± 14.
        assert abs(len(drawn[first] & drawn[second]) - 250) < 70, (first, second)


def test_the_warmup_draw_of_earlier_versions_stays():
    pool = make_pool(np.zeros((50, 1), np.float32))
    assert select_at_random(lambda: [pool], Budget("rows", 5), 0).table["row"].to_list() == [19, 17, 9, 47, 11]


def test_everything_is_selected_once_in_the_pools_order():
    pool = make_pool(np.zeros((5, 1), np.float32)).with_columns(canonical=pl.Series([True, False, True, True, True]))
    found = select_all(lambda: pool.iter_slices(2))
    assert found.table["row"].to_list() == [0, 2, 3, 4]
    assert found.table.schema == SELECTION_SCHEMA
    assert found.summary.removed == {"duplicate": 1}


def test_a_pool_without_usable_rows_is_an_error_with_the_reasons():
    pool = make_pool(np.zeros((2, 1), np.float32)).with_columns(status=pl.lit("invalid_json"))
    with pytest.raises(PoolFormatError, match="invalid_json: 2 rows"):
        select_by_score([candidates(pool)], Budget("rows", 1), "max")
    with pytest.raises(PoolFormatError, match="empty"):
        select_all(list)


def test_a_token_budget_below_the_best_row_is_an_error():
    pool = make_pool(np.ones((2, 1), np.float32)).with_columns(loss_tokens=pl.lit(50, pl.Int32))
    with pytest.raises(ProjectFileError, match="more than 49 loss tokens"):
        select_by_score([candidates(pool)], Budget("tokens", 49), "max")


@pytest.mark.parametrize(
    ("kind", "amount"), [("fraction", 0), ("fraction", 1.01), ("rows", 0), ("tokens", -1), ("fraction", float("nan"))]
)
def test_budgets_that_make_no_sense_are_refused(kind, amount):
    with pytest.raises(ValueError, match="budget"):
        Budget(kind, amount)


def test_five_per_cent_of_twenty_is_one():
    assert Budget("fraction", 0.05).rows_of(20) == 1
    assert Budget("fraction", 0.05).rows_of(270_679) == 13_533  # as in the paper
    assert Budget("fraction", 0.05).rows_of(3) == 1
    assert Budget("rows", 9).rows_of(4) == 4
