"""Poor data from one end to the other: quarantined or refused with the reason, and nothing of it in a ranking."""

import dagster as dg
import polars as pl
import pytest
from test_run import run
from tiny import question, write_rows

from less_assets.assets.selection import SUBSET, score_file
from less_assets.errors import LessAssetsError, PoolFormatError, TargetFormatError, TrainingError
from less_assets.jobs import Request
from less_assets.lineage import Lineage
from less_assets.project import load_project
from less_assets.project_check import check_data
from less_assets.resources import open_store
from less_assets.store.tables import read_parquet

UNTIL_SUBSETS = Request(until="selected_subset")


def small(tiny_project, rows: list, targets: list) -> None:
    """One source with these rows, one task with these targets, two recipes."""
    settings = tiny_project.settings
    write_rows(tiny_project.folder / "data/plus.jsonl", rows)
    write_rows(tiny_project.folder / "targets/sums.jsonl", targets)
    settings["pool"]["sources"] = settings["pool"]["sources"][:1]
    settings["tasks"] = settings["tasks"][:1]
    settings["warmup"] |= {"epochs": 2, "fraction": 1.0, "batch_size": 1}
    settings["gradients"]["token_budget"] = 256
    less = {"name": "less", "strategy": "less", "rows": 2}
    settings["recipes"] = [less, {"name": "random", "strategy": "random", "rows": 1, "seeds": [0]}]


def finished(tiny_project, request: Request = UNTIL_SUBSETS) -> Lineage:
    with dg.DagsterInstance.ephemeral() as instance:
        run(tiny_project.path, instance, request)
    project = load_project(tiny_project.path)
    return Lineage(project, open_store(project))


def test_rows_without_a_usable_gradient_have_a_reason_and_no_rank(tiny_project):
    cut_off = [{"role": "user", "content": "what is " * 40}, {"role": "assistant", "content": "nine"}]
    rows = [question(1, "plus"), cut_off, {"messages": "none"}, question(2, "plus"), {"messages": []}]
    targets = [{"messages": question(200, "plus"), "subtask": "only"}]
    small(tiny_project, rows, targets)
    line = finished(tiny_project)
    table = read_parquet(line.folder("influence_scores", "sums"), score_file("plus-00000"))
    assert table["status"].to_list() == ["ok", "no_loss_tokens", "wrong_type", "ok", "no_assistant_turn"]
    scored = [name for name in table.columns if "." in name]
    assert table.filter(pl.col("status") != "ok").select(scored).null_count().row(0) == (3,) * len(scored)
    subset = read_parquet(line.folder("selected_subset", "less|sums"), SUBSET)
    assert set(subset["example_id"]) == set(table.filter(pl.col("status") == "ok")["example_id"])
    assert subset["score"].is_finite().all()


def test_a_pool_of_one_row_and_a_subtask_of_one_row_are_enough(tiny_project):
    small(tiny_project, [question(1, "plus")], [{"messages": question(200, "plus"), "subtask": "only"}])
    tiny_project.settings["recipes"][0]["rows"] = 1
    line = finished(tiny_project, Request())
    subset = read_parquet(line.folder("selected_subset", "less|sums"), SUBSET)
    assert (subset.height, subset["score"].is_finite().all()) == (1, True)
    assert line.status("leaderboard").state == "fresh"


def test_a_task_without_examples_is_refused_before_anything_is_computed(tiny_project):
    small(tiny_project, [question(1, "plus")], [])
    problems = check_data(load_project(tiny_project.path))
    assert any("sums" in str(problem) for problem in problems)
    with pytest.raises(TargetFormatError, match="sums"):
        finished(tiny_project)


def test_a_pool_in_which_no_row_has_loss_tokens_is_refused_with_the_reason(tiny_project):
    cut_off = [{"role": "user", "content": "what is " * 40}, {"role": "assistant", "content": "nine"}]
    small(tiny_project, [cut_off], [{"messages": question(200, "plus")}])
    with pytest.raises(LessAssetsError) as caught:
        finished(tiny_project)
    assert isinstance(caught.value, TrainingError | PoolFormatError)
    assert "no example to train on" in str(caught.value)


def test_a_warmup_of_one_step_at_rate_zero_is_refused_with_what_to_do(tiny_project):
    small(tiny_project, [question(1, "plus")], [{"messages": question(200, "plus")}])
    tiny_project.settings["warmup"]["epochs"] = 1
    with pytest.raises(TrainingError, match=r"learning rate 0(.|\n)*warmup.epochs"):
        finished(tiny_project)


def test_weights_that_are_not_numbers_stop_the_warmup_and_rank_nothing(tiny_project, tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    small(tiny_project, [question(1, "plus")], [{"messages": question(200, "plus")}])
    tiny_project.settings["model"]["base"] = str(broken)
    with pytest.raises(TrainingError, match="nan"):
        finished(tiny_project)
    project = load_project(tiny_project.path)
    assert Lineage(project, open_store(project)).status("selected_subset", "less|sums").state == "blocked"
