"""Every baseline as a recipe, from the project file to the subset, on a tiny model."""

from types import SimpleNamespace

import dagster as dg
import numpy as np
import polars as pl
import pytest
from support.graph import StoredSubsets
from support.tiny import TinyProject, question, write_rows

from less_assets.reading.files import EMBEDDINGS, PASSED_OVER, score_file
from less_assets.running.runner import Request
from less_assets.steps.ranking import restraints_of
from less_assets.store.tables import read_parquet

SUBSETS = Request(tasks=("sums",), until="selected_subset")
OF_A_GROUP = Request(tasks=("both",), recipes=("bm25", "rds", "dsir-seed0"), until="selected_subset")
RECIPES = [
    {"name": "less", "strategy": "less", "fraction": 0.2},
    {"name": "bm25", "strategy": "bm25", "fraction": 0.2},
    {"name": "dsir", "strategy": "dsir", "fraction": 0.2},
    {"name": "rds", "strategy": "rds", "fraction": 0.2},
    {"name": "rds-tokens", "strategy": "rds", "tokens": 30},
    {"name": "mid", "strategy": "perplexity", "fraction": 0.2},
    {"name": "as-long", "strategy": "length_matched", "match": "rds", "fraction": 0.2},
    {"name": "as-targets", "strategy": "length_matched", "fraction": 0.2},
    {"name": "apart", "strategy": "less", "fraction": 0.2, "near_duplicates": 0.6},
    {"name": "limited", "strategy": "bm25", "fraction": 0.5, "quotas": {"plus": 0.25}},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """All baselines of a project with two tasks and a group of both."""
    project = TinyProject(tmp_path_factory.mktemp("baselines"), tiny_model)
    longer = [{"role": "user", "content": "the sea"}, {"role": "assistant", "content": "blue " * 12}]
    rows = [question(place, "blue") for place in range(10)] + [[*longer, *question(place, "sea")] for place in range(6)]
    write_rows(project.folder / "data/colors.jsonl", rows)
    project.settings["tasks"].append({"name": "both", "members": ["sums", "sky"]})
    project.settings["recipes"] = RECIPES
    with dg.DagsterInstance.ephemeral() as instance:
        found = StoredSubsets(project, instance, SUBSETS)
        found.first = found.run()
        yield found


def test_each_asset_is_made_for_the_recipes_that_need_it(made):
    assert made.first["pool_embeddings"] == made.lineage.shards()
    assert made.first["target_embeddings"] == ["sums"]
    assert made.first["embedding_scores"] == ["rds|sums", "rds-tokens|sums", "mid|sums"]
    assert made.first["text_scores"] == ["bm25|sums", "dsir-seed0|sums", "limited|sums"]
    assert len(made.first["selected_subset"]) == len(made.lineage.project.recipe_keys)
    assert made.run() == {}


def test_words_find_the_rows_of_the_tasks_kind(made):
    assert set(made.subset("bm25|sums")["source"]) == {"plus"}
    assert made.subset("bm25|sums")["rank"].to_list() == list(range(1, 9))
    drawn = made.subset("dsir-seed0|sums")
    lineage = made.lineage
    weights = pl.concat(
        [
            read_parquet(lineage.folder("text_scores", "dsir-seed0|sums"), score_file(shard))
            for shard in lineage.shards()
        ]
    ).select("example_id", pl.col("score").arr.first().alias("weight"))
    mean = drawn.join(weights, on="example_id")["weight"].mean()
    assert mean > weights["weight"].mean() + weights["weight"].std() / 2


def test_recipes_that_differ_in_budget_or_seed_share_their_scores(made):
    lineage = made.lineage
    for asset, keys in (("embedding_scores", ("rds", "rds-tokens")), ("text_scores", ("bm25", "limited"))):
        first, second = (lineage.folder(asset, f"{key}|sums") for key in keys)
        assert str(first.root) == str(second.root)


def test_rds_takes_the_nearest_row_of_each_target_example_in_turn(made):
    lineage = made.lineage
    pool = pl.concat([read_parquet(lineage.folder("pool_embeddings", shard), EMBEDDINGS) for shard in lineage.shards()])
    targets = read_parquet(lineage.folder("target_embeddings", "sums"), EMBEDDINGS)
    vectors, wanted = (
        table["embedding"].to_numpy() / np.linalg.norm(table["embedding"].to_numpy(), axis=1, keepdims=True)
        for table in (pool, targets)
    )
    cosines = vectors @ wanted.T
    taken: list[int] = []
    while len(taken) < 8:
        scores = cosines[:, len(taken) % 4].copy()
        scores[taken] = -2
        taken.append(int(scores.argmax()))
    subset = made.subset("rds|sums")
    assert subset["example_id"].to_list() == pool["example_id"][taken].to_list()
    assert subset["subtask"].to_list() == (targets["subtask"].to_list() * 2)


def test_perplexity_keeps_the_middle(made):
    lineage = made.lineage
    pool = pl.concat([read_parquet(lineage.folder("pool_embeddings", shard), EMBEDDINGS) for shard in lineage.shards()])
    ordered = pool.sort("loss", descending=True)["example_id"].to_list()
    middle = made.subset("mid|sums")["example_id"].to_list()
    assert set(middle) <= set(ordered[14:26])


def test_token_budgets_hold_for_baselines(made):
    subset = made.subset("rds-tokens|sums")
    assert 0 < subset["loss_tokens"].sum() <= 30


def test_length_matched_rows_are_as_long_as_the_others(made):
    matched, reference = made.subset("as-long-seed0|sums"), made.subset("rds|sums")
    assert matched.height == reference.height
    assert matched["score"].null_count() == matched.height
    # Targets have two tokens, the short rows of the pool three (with their end): the long ones are never drawn.
    assert made.subset("as-targets-seed0|sums")["loss_tokens"].max() < 10


def test_quotas_limit_a_source_and_say_what_was_passed_over(made):
    subset = made.subset("limited|sums")
    assert subset.filter(source="plus").height == 5  # a quarter of 20, rounded down
    assert subset.height == 20
    folder = made.lineage.folder("selected_subset", "limited|sums")
    passed = read_parquet(folder, PASSED_OVER)
    assert set(passed["reason"]) == {"quota"}
    assert made.lineage.summary("selected_subset", "limited|sums")["removed"]["quota"] == passed.height
    assert not set(passed["example_id"]) & set(subset["example_id"])


def test_near_duplicates_in_gradient_space_are_passed_over_and_the_kept_one_is_named(made):
    lineage = made.lineage
    subset = made.subset("apart|sums")
    passed = read_parquet(lineage.folder("selected_subset", "apart|sums"), PASSED_OVER)
    work = SimpleNamespace(lineage=lineage, project=lineage.project)
    vectors = restraints_of(work, lineage.project.recipe("apart")).vectors
    rows = pl.concat([subset, passed], how="diagonal").sort("shard", "row")
    vector = dict(zip(rows["example_id"], vectors(rows), strict=True))
    chosen = np.stack([vector[each] for each in subset["example_id"]])
    similar = chosen @ chosen.T
    assert np.diag(similar) == pytest.approx(1, abs=1e-5)
    assert (similar - np.eye(len(chosen)) * 2).max() < 0.6
    assert passed.height > 0
    for row in passed.iter_rows(named=True):
        assert row["reason"] == "near_duplicate"
        assert row["similarity"] == pytest.approx(vector[row["example_id"]] @ vector[row["kept"]], abs=1e-5)
        assert row["kept"] in set(subset["example_id"])
    plain = made.subset("less|sums")["example_id"].to_list()
    assert subset["example_id"][0] == plain[0]
    assert lineage.summary("selected_subset", "apart|sums")["removed"]["near_duplicate"] == passed.height


def test_a_group_of_tasks_shares_one_subset_and_each_row_says_whose_it_is(made):
    made.run(OF_A_GROUP)
    for recipe in OF_A_GROUP.recipes:
        subset = made.subset(f"{recipe}|both")
        assert subset["task"].to_list()[:4] == ["sums", "sky", "sums", "sky"], recipe
        assert subset["task"].value_counts().sort("task")["count"].to_list() == [4, 4], recipe
        assert subset["example_id"].is_unique().all()
    assert set(made.subset("rds|both")["subtask"]) == {"part-0", "part-1"}


def test_a_new_shard_costs_one_partition_of_embeddings(made):
    write_rows(made.tiny.folder / "data/colors_more.jsonl", [question(500 + place, "blue") for place in range(6)])
    again = made.run(Request(tasks=("sums",), until="embedding_scores"))
    assert again["pool_embeddings"] == ["colors-00001"]
    assert "target_embeddings" not in again
    assert again["embedding_scores"] == ["rds|sums", "rds-tokens|sums", "mid|sums"]
