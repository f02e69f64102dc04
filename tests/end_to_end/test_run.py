"""The whole graph on a tiny model, through the same runner as the command line."""

import dagster as dg
import polars as pl
import pytest

from less_assets.assets.ranking import EXACT, EXACT_COLUMN
from less_assets.assets.selection import SUBSET
from less_assets.build import build_definitions
from less_assets.jobs import GraphRunner, Outcome, Request, register_shards
from less_assets.lineage import Lineage
from less_assets.project import load_project
from less_assets.resources import open_store
from less_assets.store.tables import read_parquet

EVERYTHING = Request()


def run(project_file, instance, request=EVERYTHING) -> Outcome:
    """Load the project and bring it up to date; returns what was materialized."""
    project = load_project(project_file)
    store = open_store(project)
    register_shards(project, store, instance)
    return GraphRunner(build_definitions(project), project, store, instance, print).run(request)


@pytest.fixture
def instance():
    with dg.DagsterInstance.ephemeral() as found:
        yield found


def test_everything_is_made_once(tiny_project, instance):
    outcome = run(tiny_project.path, instance)
    assert outcome.materialized["train_gradients"] == [
        f"epoch-{epoch}|{shard}"
        for epoch in (1, 2)
        for shard in ("plus-00000", "plus-00001", "colors-00000", "colors-00001")
    ]
    assert run(tiny_project.path, instance).materialized == {}


def test_exact_rescoring_of_the_whole_pool_selects_the_exact_best(tiny_project, instance):
    recipe = {"name": "exact", "strategy": "less", "rows": 6, "rescore": "exact", "aggregate": "mean"}
    tiny_project.settings["recipes"] = [
        {**recipe, "candidates": 100.0},
        {"name": "random", "strategy": "random", "rows": 6},
    ]
    # More dimensions than parameters: the sparse sketch only permutes and signs, so sketched scores are exact too.
    tiny_project.settings["gradients"] |= {"dimension": 4096, "storage": "float16"}
    outcome = run(tiny_project.path, instance, Request(until="selected_subset"))
    assert outcome.materialized["exact_scores"] == ["exact|sums", "exact|sky"]
    project = load_project(tiny_project.path)
    line = Lineage(project, open_store(project))
    table = read_parquet(line.folder("exact_scores", "exact|sums"), EXACT)
    assert table.height == 44
    best = table.with_columns(pl.col(EXACT_COLUMN).arr.mean().alias("mean")).sort("mean", descending=True).head(6)
    subset = read_parquet(line.folder("selected_subset", "exact|sums"), SUBSET)
    assert subset["example_id"].to_list() == best["example_id"].to_list()
    correlation = table.select(pl.corr("sketched_score", pl.col(EXACT_COLUMN).arr.mean())).item()
    assert correlation > 0.999, "sketched and exact scores of the same rows must agree"
