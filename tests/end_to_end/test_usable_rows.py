"""Rows that the model's encoder refuses are known before anything is drawn, and are told at the command line."""

import json
import shutil

import dagster as dg
import polars as pl
import pytest
from support.graph import run
from typer.testing import CliRunner

from less_assets.cli import app
from less_assets.project.project import load_project
from less_assets.reading.files import EMBEDDINGS, INDEX, SAMPLE, SUBSET, score_file
from less_assets.reading.rows import refused_rows
from less_assets.running.runner import Request
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

STRICT = "{% for m in messages %}{% if 'forbidden' in m['content'] %}{{ raise_exception('no such words here') }}"
FORBIDDEN, TOO_LONG = 10, 4
USABLE = 24 + 20 - FORBIDDEN


@pytest.fixture(scope="module")
def strict_model(tiny_model, tmp_path_factory):
    """The tiny model, whose template refuses a word."""
    model = shutil.copytree(tiny_model, tmp_path_factory.mktemp("strict") / "model")
    template = model / "chat_template.jinja"
    template.write_text(STRICT + "{% endif %}{% endfor %}" + template.read_text())
    return model


@pytest.fixture
def strict_project(tiny_project, strict_model):
    """Of 49 rows 10 are refused by the template, 4 are too long, one is broken."""
    pool = tiny_project.folder / "data/plus.jsonl"
    rows = pool.read_text().splitlines()
    rows[:FORBIDDEN] = [row.replace("what", "forbidden") for row in rows[:FORBIDDEN]]
    for number in range(TOO_LONG):
        turns = [{"role": "user", "content": f"{number} ? " + "a " * 40}, {"role": "assistant", "content": "b"}]
        rows.append(json.dumps({"messages": turns}))
    pool.write_text("\n".join([*rows, '{"messages": []}']) + "\n")
    tiny_project.settings["model"]["base"] = str(strict_model)
    tiny_project.settings["tasks"] = tiny_project.settings["tasks"][:1]
    return tiny_project


def said(project, *arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--project", str(project.path)])
    assert result.exit_code == 0, result.output
    return result.stdout


def opened(project):
    loaded = load_project(project.path)
    return open_lineage(loaded, open_store(loaded))


def test_equal_budgets_train_on_equal_rows_and_the_counts_are_told(strict_project, monkeypatch):
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    strict_project.settings["recipes"] += [
        {"name": "as-less", "strategy": "length_matched", "match": "less", "fraction": 0.2, "seeds": [0]},
        {"name": "bm25", "strategy": "bm25", "fraction": 0.2},
        {"name": "dsir", "strategy": "dsir", "fraction": 0.2, "seeds": [0]},
        {"name": "rds", "strategy": "rds", "fraction": 0.2},
    ]
    counts = "49 rows, 34 usable, 1 quarantined, 14 refused"
    checked = said(strict_project, "check")
    assert f"Sample of the pool: {counts}" in checked
    assert "data/plus.jsonl:1 " in checked, "the first refused row"
    assert "data/plus.jsonl:25 " in checked, "the first that is too long"

    ended = said(strict_project, "run", "--no-extras")
    lineage = opened(strict_project)
    budgets = ["less", "random-seed0", "as-less-seed0", "bm25", "dsir-seed0", "rds"]
    trained = {key: lineage.summary("finetuned_model", f"{key}|sums")["examples"] for key in [*budgets, "full"]}
    assert trained == {**dict.fromkeys(budgets, USABLE // 5), "full": USABLE}
    assert lineage.summary("warmup_sample")["rows"] == USABLE // 2
    assert lineage.summary("warmup_checkpoints", "epoch-1")["examples"] == USABLE // 2
    refused = set(refused_rows(lineage)["example_id"])
    assert len(refused) == FORBIDDEN + TOO_LONG
    for key in trained:
        assert refused.isdisjoint(read_parquet(lineage.folder("selected_subset", f"{key}|sums"), SUBSET)["example_id"])
    scores = read_parquet(lineage.folder("influence_scores", "sums"), score_file("plus-00000"))
    assert scores["status"].to_list() == ["template_refuses"] * FORBIDDEN + ["ok"] * (16 - FORBIDDEN)
    last = read_parquet(lineage.folder("influence_scores", "sums"), score_file("plus-00001"))
    assert last["status"].to_list()[8:12] == ["prompt_too_long"] * TOO_LONG
    embedded = read_parquet(lineage.folder("pool_embeddings", "plus-00001"), EMBEDDINGS)
    assert embedded["status"].to_list() == last["status"].to_list()

    for output in (ended, said(strict_project, "plan", "--no-calibrate")):
        assert f"Pool: {counts}" in output
        assert "no such words here" in output
        assert scores["example_id"][0] in output
        assert "Warning: 31% of these rows cannot be used" in output
    planned = json.loads(said(strict_project, "plan", "--no-calibrate", "--json"))
    assert [planned["pool"][kind] for kind in ("usable", "quarantined", "refused")] == [34, 1, 14]
    assert sum(asset["to_make"] != [] for asset in planned["assets"] if asset["asset"] != "token_attribution") <= 1


def test_another_length_changes_which_rows_count_and_a_frozen_sample_stays(strict_project):
    with dg.DagsterInstance.ephemeral() as instance:
        strict_project.settings["model"]["max_length"] = 64
        run(strict_project.path, instance, Request(until="warmup_sample"))
        lineage = opened(strict_project)
        assert lineage.summary("pool_index")["usable"] == USABLE + TOO_LONG
        drawn = read_parquet(lineage.folder("warmup_sample"), SAMPLE)
        strict_project.settings["model"]["max_length"] = 32
        run(strict_project.path, instance, Request(until="warmup_sample"))
        lineage = opened(strict_project)
        index = read_parquet(lineage.folder("pool_index"), INDEX)
        assert index.height == USABLE
        assert read_parquet(lineage.folder("warmup_sample"), SAMPLE).equals(drawn)
        assert drawn.filter(~pl.col("example_id").is_in(index["example_id"].implode())).height


def test_rows_that_are_all_usable_leave_the_index_as_it_was_before_rows_were_refused(tiny_project):
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project.path, instance, Request(until="pool_index"))
    plan = opened(tiny_project).plan("pool_index")
    assert plan.determined_by == {name: version for name, version in plan.inputs.items() if "instruction_pool" in name}


def test_a_pool_without_a_usable_row_is_refused_with_the_reasons(strict_project):
    pool = strict_project.folder / "data/plus.jsonl"
    pool.write_text("\n".join(pool.read_text().splitlines()[:FORBIDDEN]) + "\n")
    strict_project.settings["pool"]["sources"] = strict_project.settings["pool"]["sources"][:1]
    result = CliRunner().invoke(app, ["run", "--project", str(strict_project.path), "--until", "pool_index"])
    assert result.exit_code == 1
    assert "template_refuses: 10" in result.output
