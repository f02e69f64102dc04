"""The whole graph on a tiny model, through the same runner as the command line."""

import shutil

import dagster as dg
import polars as pl
import pytest
from support.graph import run

from less_assets.inspection.summary import results
from less_assets.project.project import load_project
from less_assets.reading.files import EXACT, EXACT_COLUMN, SUBSET
from less_assets.running.runner import Request
from less_assets.steps.gradients import describe_train_gradients
from less_assets.steps.registry import open_lineage, open_store
from less_assets.steps.shown import Stored
from less_assets.store.tables import read_parquet


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


def test_rows_that_the_chat_template_refuses_are_told_with_its_own_words(tiny_project, instance, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "strict-model")
    template = model / "chat_template.jinja"
    strict = "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('no such words here') }}"
    template.write_text(strict + "{% endif %}{% endfor %}" + template.read_text())
    pool = tiny_project.folder / "data/plus.jsonl"
    rows = pool.read_text().splitlines()
    pool.write_text("\n".join([rows[0].replace("what", "forbidden"), *rows[1:]]) + "\n")
    tiny_project.settings["model"]["base"] = str(model)
    run(tiny_project.path, instance, Request(tasks=("sums",), until="influence_scores"))
    project = load_project(tiny_project.path)
    lineage = open_lineage(project, open_store(project))
    scores = read_parquet(lineage.folder("influence_scores", "sums"), "scores/plus-00000.parquet")
    assert scores["status"].to_list() == ["template_refuses", *["ok"] * 15]
    summary = lineage.summary("train_gradients", "epoch-1|plus-00000")
    assert summary["status"] == {"ok": 15, "template_refuses": 1}
    (reason,) = summary["refused_rows"]
    assert "no such words here" in reason
    manifest = lineage.fresh("train_gradients", "epoch-1|plus-00000")
    folder = lineage.folder("train_gradients", "epoch-1|plus-00000")
    shown = describe_train_gradients(Stored(lineage, "epoch-1|plus-00000", folder, manifest))
    assert shown.values["refused_rows"].frame.rows() == [(reason, 1)]
    said = results(project, open_store(project))
    assert "Pool: 44 rows, 43 usable, 0 quarantined, 1 refused" in said
    assert scores["example_id"][0] in said
    assert "Warning" not in said


def test_a_run_warns_of_a_pool_that_lost_more_than_a_tenth(tiny_project, instance):
    pool = tiny_project.folder / "data/plus.jsonl"
    pool.write_text(pool.read_text() + '{"messages": []}\n' * 6)
    run(tiny_project.path, instance, Request(until="pool_index"))
    project = load_project(tiny_project.path)
    said = results(project, open_store(project))
    assert "Pool: 50 rows, 44 usable, 6 quarantined, 0 refused" in said
    assert "plus.jsonl:25" in said
    assert "Warning: 12% of these rows cannot be used" in said


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
    lineage = open_lineage(project, open_store(project))
    table = read_parquet(lineage.folder("exact_scores", "exact|sums"), EXACT)
    assert table.height == 44
    best = table.with_columns(pl.col(EXACT_COLUMN).arr.mean().alias("mean")).sort("mean", descending=True).head(6)
    subset = read_parquet(lineage.folder("selected_subset", "exact|sums"), SUBSET)
    assert subset["example_id"].to_list() == best["example_id"].to_list()
    correlation = table.select(pl.corr("sketched_score", pl.col(EXACT_COLUMN).arr.mean())).item()
    assert correlation > 0.999, "sketched and exact scores of the same rows must agree"
