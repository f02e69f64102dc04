"""Rows that `exclude` names rank in no recipe, are listed with their reason, and make stale what depends on them."""

import json

import dagster as dg
import polars as pl
import pytest
from support.graph import run
from support.tiny import TinyProject

from less_assets.inspection.explain import explain_row, in_words
from less_assets.inspection.summary import results
from less_assets.lineage.lineage import Lineage
from less_assets.project.project import load_project
from less_assets.reading.files import EXACT, EXCLUDED, ROWS, SAMPLE, SUBSET
from less_assets.report.contents import report_contents
from less_assets.running.runner import Request
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

BUDGET = {"rows": 6}
RECIPES = [
    {"name": "less", "strategy": "less", **BUDGET},
    {"name": "exact", "strategy": "less", "rescore": "exact", "candidates": 1, **BUDGET},
    {"name": "random", "strategy": "random", "seeds": [0], **BUDGET},
    {"name": "bm25", "strategy": "bm25", **BUDGET},
    {"name": "dsir", "strategy": "dsir", **BUDGET},
    {"name": "rds", "strategy": "rds", **BUDGET},
    {"name": "mid", "strategy": "perplexity", **BUDGET},
    {"name": "as-long", "strategy": "length_matched", "match": "bm25", **BUDGET},
    {"name": "full", "strategy": "full"},
    {"name": "base", "strategy": "none"},
]
SUBSETS = Request(tasks=("sums",), until="selected_subset")
REPORT = Request(tasks=("sums",), recipes=("less",), until="selection_report")


class Excluding:
    """A tiny project whose rows can be left out."""

    def __init__(self, project: TinyProject, instance: dg.DagsterInstance) -> None:
        self.tiny, self.instance = project, instance

    def leave_out(self, reasons: dict[str, str]) -> None:
        lines = [json.dumps({"example_id": name, "reason": reason}) for name, reason in reasons.items()]
        (self.tiny.folder / "left-out.jsonl").write_text("".join(f"{line}\n" for line in lines))
        self.tiny.settings["exclude"] = ["left-out.jsonl"]

    def run(self, request: Request = SUBSETS) -> dict[str, list]:
        return run(self.tiny.path, self.instance, request).materialized

    @property
    def lineage(self) -> Lineage:
        project = load_project(self.tiny.path)
        return open_lineage(project, open_store(project))

    def selected(self) -> dict[str, list[str]]:
        lineage = self.lineage
        return {
            key: read_parquet(lineage.folder("selected_subset", f"{key}|sums"), SUBSET)["example_id"].to_list()
            for key in lineage.project.recipe_keys
        }


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model):
    tiny = TinyProject(tmp_path_factory.mktemp("excluding"), tiny_model)
    tiny.settings["recipes"] = RECIPES
    with dg.DagsterInstance.ephemeral() as instance:
        yield Excluding(tiny, instance)


def test_excluded_rows_rank_nowhere_and_make_stale_what_depends_on_them(project):
    project.run()
    before = project.selected()
    sample = read_parquet(project.lineage.folder("warmup_sample"), SAMPLE)["example_id"].to_list()
    best = {names[0]: f"best of {key}" for key, names in before.items() if names and key != "full"}
    project.leave_out({**best, "0" * 32: "not there"})
    made = project.run()
    after = project.selected()
    for key, names in after.items():
        assert not set(names) & set(best), key
        assert len(names) == len(before[key]) - (len(best) if key == "full" else 0), "the budget is used up as before"
    kept = {key: [name for name in names if name not in best] for key, names in before.items()}
    assert all(after[key][: len(kept[key])] == kept[key] for key in ("random-seed0", "full"))
    assert set(made) == {"excluded_rows", "warmup_sample", "exact_scores", "selected_subset"}, "nothing else is stale"
    lineage = project.lineage
    assert read_parquet(lineage.folder("warmup_sample"), SAMPLE)["example_id"].to_list() == sample, "it is frozen"
    assert not set(read_parquet(lineage.folder("exact_scores", "exact|sums"), EXACT)["example_id"]) & set(best)
    listed = read_parquet(lineage.folder("excluded_rows"), EXCLUDED)
    assert dict(listed.filter("in_pool").select("example_id", "reason").iter_rows()) == best
    assert lineage.summary("excluded_rows")["unknown"] == 1
    for name, reason in list(best.items())[:1]:
        assert f"left out by `exclude`: {reason}" in in_words(explain_row(lineage, "sums", name))
    assert f"Left out by `exclude`: {len(best)} rows; 1 ids" in results(lineage.project, lineage.store, ["sums"])
    removed = lineage.summary("selected_subset", "less|sums")["removed"]
    assert removed["excluded"] == len(best)

    project.leave_out(dict.fromkeys(best, "another reason"))
    assert set(project.run()) == {"excluded_rows"}, "another reason, and no unknown id, change no selection"
    del project.tiny.settings["exclude"]
    project.run()
    assert project.selected() == before


def test_a_page_shows_no_excluded_row_below_the_cut(project):
    project.tiny.settings.pop("exclude", None)
    project.tiny.settings["report"] = {"token_rows": 2, "context_rows": 3}
    project.run(REPORT)
    rows = read_parquet(project.lineage.folder("token_attribution", "less|sums"), ROWS)
    below = rows.filter(pl.col("group") == "below_cut")["example_id"].to_list()
    project.leave_out({below[0]: "wrong label"})
    made = project.run(REPORT)
    assert {"token_attribution", "selection_report"} <= set(made)
    page = report_contents(project.lineage, "less", "sums", lambda total, unit: lambda done: None)
    assert page.head["excluded"] == [[below[0], "wrong label"]]
    rows = read_parquet(project.lineage.folder("token_attribution", "less|sums"), ROWS)
    assert below[0] not in rows["example_id"].to_list()
    assert set(below[1:]) < set(rows.filter(pl.col("group") == "below_cut")["example_id"])
    del project.tiny.settings["exclude"]
    project.run(REPORT)
    in_force = project.lineage.folder("selection_report", "less|sums")
    entry = project.tiny.folder / "artifacts/selection/sums/reports/less/index.html"
    assert f'href="{in_force.fingerprint}/report.html"' in entry.read_text(), "also of what was stored already"


def test_a_warm_up_that_is_not_drawn_yet_does_not_draw_them(tmp_path, tiny_model):
    with dg.DagsterInstance.ephemeral() as instance:
        project = Excluding(TinyProject(tmp_path, tiny_model), instance)
        until_sample = Request(until="warmup_sample")
        project.run(until_sample)
        drawn = read_parquet(project.lineage.folder("warmup_sample"), SAMPLE)["example_id"].to_list()
        project.leave_out({drawn[0]: "empty answer"})
        project.tiny.settings["storage"]["root"] = "elsewhere"
        project.run(until_sample)
        again = read_parquet(project.lineage.folder("warmup_sample"), SAMPLE)["example_id"].to_list()
        assert again[: len(drawn) - 1] == drawn[1:]
