"""A prefilter: only kept rows have gradients, what that loses is measured, and a change makes again what it changes."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from support.graph import StoredSubsets
from support.tiny import TinyProject

from less_assets.inspection.explain import explain_row, in_words
from less_assets.inspection.pool_counts import pool_counts, prefilter_in_words
from less_assets.inspection.trace import in_words as trace_words
from less_assets.inspection.trace import trace_row
from less_assets.lineage.lineage import Lineage
from less_assets.reading.files import INDEX, KEPT, score_file
from less_assets.reading.shard_features import ShardFeatures
from less_assets.running.runner import Request
from less_assets.store.tables import read_parquet

KEEP = 0.3
RECIPES = [
    {"name": "less", "strategy": "less", "fraction": 0.2, "aggregate": "max"},
    {"name": "text", "strategy": "bm25", "fraction": KEEP},
]
SUBSETS = Request(until="selected_subset")


def tiny(folder: Path, model: Path, **prefilter) -> TinyProject:
    project = TinyProject(folder, model)
    project.settings["recipes"] = RECIPES
    project.settings["warmup"]["epochs"] = 1
    if prefilter:
        project.settings["prefilter"] = {"strategy": "bm25", "keep": KEEP, **prefilter}
    return project


@pytest.fixture(scope="module")
def filtered(tmp_path_factory, tiny_model) -> Iterator[StoredSubsets]:
    """One task, and every row that the prefilter drops in the sample."""
    project = tiny(tmp_path_factory.mktemp("filtered"), tiny_model, sample_rows=1000)
    project.settings["tasks"] = project.settings["tasks"][:1]
    with dg.DagsterInstance.ephemeral() as instance:
        stored = StoredSubsets(project, instance, SUBSETS)
        stored.run()
        yield stored


def kept(lineage: Lineage) -> dict[str, list]:
    return {
        shard: read_parquet(lineage.folder("kept_rows", shard), KEPT).select("row", "sampled").rows()
        for shard in lineage.shards()
    }


def index_of(lineage: Lineage) -> pl.DataFrame:
    return read_parquet(lineage.folder("pool_index"), INDEX)


def test_the_prefilter_keeps_what_a_recipe_of_its_strategy_selects_and_only_that_can_be_selected(filtered):
    lineage = filtered.lineage
    best = read_parquet(lineage.folder("prefiltered_pool", "sums"), KEPT)["example_id"].to_list()
    assert best == filtered.subset("text|sums")["example_id"].to_list()
    assert set(filtered.subset("less|sums")["example_id"]) <= set(best)
    for shard in lineage.shards():
        scores = read_parquet(lineage.folder("influence_scores", "sums"), score_file(shard))
        ranked = scores.filter(pl.col("status") == "ok")
        assert set(ranked["example_id"]) == set(scores["example_id"]) & set(best)
        assert set(scores.filter(pl.col("status") != "ok")["status"]) <= {"prefiltered"}
        assert scores["adamw.mean_cosine"].is_not_null().to_list() == (scores["status"] == "ok").to_list()


def test_a_short_training_on_the_targets_may_choose_what_gets_gradients(tmp_path, tiny_model):
    project = tiny(tmp_path, tiny_model, strategy="target_tuned")
    project.settings["target_tuning"] = {"epochs": 1}
    tuned = {"name": "tuned", "strategy": "target_tuned", "fraction": KEEP}
    with dg.DagsterInstance.ephemeral() as instance:
        StoredSubsets(project, instance, SUBSETS).run()
        project.settings["recipes"] = [*RECIPES[:1], tuned]
        stored = StoredSubsets(project, instance, SUBSETS)
        made = stored.run()
        assert set(made) == {"recipe_settings", "selected_subset"}, "its scores were there already"
        best = read_parquet(stored.lineage.folder("prefiltered_pool", "sums"), KEPT)["example_id"].to_list()
        assert best == stored.subset("tuned|sums")["example_id"].to_list()


def test_a_sample_of_all_dropped_rows_gives_the_true_recall(filtered, tmp_path, tiny_model):
    whole = tiny(tmp_path, tiny_model)
    whole.settings["tasks"] = whole.settings["tasks"][:1]
    with dg.DagsterInstance.ephemeral() as instance:
        from_whole_pool = StoredSubsets(whole, instance, SUBSETS)
        from_whole_pool.run()
        wanted = from_whole_pool.subset("less|sums")["example_id"].to_list()
    still = set(wanted) & set(filtered.subset("less|sums")["example_id"])
    found = filtered.lineage.summary("selected_subset", "less|sums")
    assert 0 < len(still) < len(wanted), "else the numbers are not put to the test"
    assert found["recall"] == found["recall_low"] == found["recall_high"] == pytest.approx(len(still) / len(wanted))
    assert prefilter_in_words(filtered.lineage).endswith(
        "together 13 of 44 distinct rows (30%) have gradients, and 31 of the others as a sample"
    )
    assert "recall" not in filtered.lineage.summary("selected_subset", "text|sums")


def test_a_dropped_row_is_told_apart_from_rows_that_cannot_be_used(filtered):
    lineage = filtered.lineage
    best = set(read_parquet(lineage.folder("prefiltered_pool", "sums"), KEPT)["example_id"])
    name = next(name for name in index_of(lineage)["example_id"] if name not in best)
    assert "prefilter" in in_words(explain_row(lineage, "sums", name))
    counts = pool_counts(lineage)
    assert counts is not None
    assert counts["usable"] == counts["rows"] == 44


def test_another_task_makes_the_shards_again_of_which_it_keeps_more_and_no_others(tmp_path, tiny_model):
    project = tiny(tmp_path, tiny_model, sample_rows=6)
    tasks = project.settings["tasks"]
    project.settings["tasks"] = tasks[:1]
    with dg.DagsterInstance.ephemeral() as instance:
        stored = StoredSubsets(project, instance, SUBSETS)
        stored.run()
        before = kept(stored.lineage)
        project.settings["tasks"] = tasks
        made = stored.run()
        lineage, after = stored.lineage, kept(stored.lineage)
        changed = [shard for shard in before if before[shard] != after[shard]]
        assert 0 < len(changed) < len(before), "else the test says nothing"
        assert made["train_gradients"] == [f"epoch-1|{shard}" for shard in changed]
        assert {task for task in made["text_scores"] if task.startswith("prefilter|")} == {"prefilter|sky"}
        union = {
            name
            for task in ("sums", "sky")
            for name in read_parquet(lineage.folder("prefiltered_pool", task), KEPT)["example_id"]
        }
        for shard, rows in after.items():
            features = ShardFeatures.of(lineage, "epoch-1", shard)
            assert features.reader.rows == len(rows)
            names = index_of(lineage).filter(shard=shard)["example_id"].to_list()
            assert [names[row] for row, sampled in rows if not sampled] == [name for name in names if name in union]
        assert stored.run() == {}, "nothing is left to do"
        some = next((shard, rows) for shard, rows in after.items() if len(rows) < 16)
        dropped = next(row for row in range(16) if row not in [row for row, _ in some[1]])
        name = index_of(lineage).filter((pl.col("shard") == some[0]) & (pl.col("row") == dropped))["example_id"][0]
        assert "the prefilter left the row out" in trace_words(trace_row(lineage, name))
