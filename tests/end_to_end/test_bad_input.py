"""Poor data from one end to the other: quarantined or refused with the reason, and nothing of it in a ranking."""

import dagster as dg
import polars as pl
import pytest
from support.graph import replaced, run
from support.tiny import question, write_rows

from less_assets.compute.step import StepInputs, StepResult
from less_assets.errors import EvaluationError, LessAssetsError, PoolFormatError, TargetFormatError, TrainingError
from less_assets.lineage.lineage import Lineage
from less_assets.method.evaluation import evaluation
from less_assets.method.training import training
from less_assets.project.data_check import check_data
from less_assets.project.project import load_project
from less_assets.reading.files import SUBSET
from less_assets.running.runner import Request
from less_assets.steps import gradients
from less_assets.steps.registry import open_lineage, open_store
from less_assets.steps.selection import score_file
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
    return open_lineage(project, open_store(project))


def test_rows_without_a_usable_gradient_have_a_reason_and_no_rank(tiny_project):
    cut_off = [{"role": "user", "content": "what is " * 40}, {"role": "assistant", "content": "nine"}]
    rows = [question(1, "plus"), cut_off, {"messages": "none"}, question(2, "plus"), {"messages": []}]
    targets = [{"messages": question(200, "plus"), "subtask": "only"}]
    small(tiny_project, rows, targets)
    lineage = finished(tiny_project)
    table = read_parquet(lineage.folder("influence_scores", "sums"), score_file("plus-00000"))
    assert table["status"].to_list() == ["ok", "prompt_too_long", "wrong_type", "ok", "no_assistant_turn"]
    scored = [name for name in table.columns if "." in name]
    assert table.filter(pl.col("status") != "ok").select(scored).null_count().row(0) == (3,) * len(scored)
    subset = read_parquet(lineage.folder("selected_subset", "less|sums"), SUBSET)
    assert set(subset["example_id"]) == set(table.filter(pl.col("status") == "ok")["example_id"])
    assert subset["score"].is_finite().all()


def test_a_pool_of_one_row_and_a_subtask_of_one_row_are_enough(tiny_project):
    small(tiny_project, [question(1, "plus")], [{"messages": question(200, "plus"), "subtask": "only"}])
    tiny_project.settings["recipes"][0]["rows"] = 1
    lineage = finished(tiny_project, Request())
    subset = read_parquet(lineage.folder("selected_subset", "less|sums"), SUBSET)
    assert (subset.height, subset["score"].is_finite().all()) == (1, True)
    assert lineage.status("leaderboard").state == "fresh"


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
    assert isinstance(caught.value, PoolFormatError)
    assert "No row of the pool can be used" in str(caught.value)
    assert "prompt_too_long: 1" in str(caught.value)


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
    assert open_lineage(project, open_store(project)).status("selected_subset", "less|sums").state == "blocked"


TASKS = ("sums", "sky")
SHARDS = ("plus-00000", "plus-00001", "colors-00000", "colors-00001")


def gradients_with_failing(endings: tuple[str, ...], project_file, instance) -> tuple[list[str], LessAssetsError]:
    """Make gradients, of which some fail; returns what was tried, and how the run ended."""
    tried, extract = [], gradients.extract_train_gradients

    def fails(work: StepInputs) -> StepResult:
        tried.append(work.partition)
        if work.partition.endswith(endings):
            raise TrainingError("no finite gradient", where=work.partition, fix="look at the row")
        return extract(work)

    with pytest.MonkeyPatch.context() as patched:
        replaced(patched, "train_gradients", compute=fails)
        with pytest.raises(TrainingError) as caught:
            run(project_file, instance, Request(until="train_gradients"))
    return tried, caught.value


def test_a_shard_that_fails_does_not_keep_the_others_from_being_made(tiny_project, capfd):
    bad = ("epoch-1|plus-00000", "epoch-1|colors-00000")
    every = [f"epoch-{epoch}|{shard}" for epoch in (1, 2) for shard in SHARDS]
    with dg.DagsterInstance.ephemeral() as instance:
        tried, error = gradients_with_failing(bad, tiny_project.path, instance)
        assert tried == every, "of its own run, and of the next one"
        assert (error.what, error.where) == ("no finite gradient", "epoch-1|plus-00000")
        said = capfd.readouterr().err
        assert "train_gradients epoch-1|colors-00000 failed: no finite gradient" in said
        assert f"train_gradients failed for {', '.join(bad)}; the first one's trouble follows" in said
        made = instance.get_materialized_partitions(dg.AssetKey("train_gradients"))
        assert made == set(every) - set(bad)
        left = run(tiny_project.path, instance, Request(until="gradient_datastore")).materialized
        assert left["train_gradients"] == list(bad)
        assert left["gradient_datastore"] == ["epoch-1", "epoch-2"]


def test_what_fails_three_times_in_a_row_is_tried_no_more(tiny_project):
    with dg.DagsterInstance.ephemeral() as instance:
        tried, _ = gradients_with_failing(SHARDS, tiny_project.path, instance)
    assert tried == [f"epoch-{epoch}|{shard}" for epoch in (1, 2) for shard in SHARDS[:3]]


def test_a_model_that_cannot_be_trained_does_not_keep_the_other_recipes_from_their_answers(tiny_project, capfd):
    train = training.train_adapter

    def fails(model, tokenizer, examples, *more, **named):
        if len(examples) == 44:  # the whole pool
            raise TrainingError("out of memory")
        return train(model, tokenizer, examples, *more, **named)

    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(training, "train_adapter", fails)
            with pytest.raises(TrainingError, match="out of memory"):
                run(tiny_project.path, instance)
        assert "task_results: 2 of 2 cannot be made without what failed" in capfd.readouterr().out
        answered = instance.get_materialized_partitions(dg.AssetKey("eval_results"))
        assert answered == {f"{recipe}|{task}" for recipe in ("less", "random-seed0", "base") for task in TASKS}
        reported = instance.get_materialized_partitions(dg.AssetKey("selection_report"))
        assert {f"less|{task}" for task in TASKS} <= reported
        left = run(tiny_project.path, instance).materialized
    assert left["finetuned_model"] == left["eval_results"] == [f"full|{task}" for task in TASKS]
    assert left.keys() == {"finetuned_model", "eval_results", "task_results", "leaderboard"}


def test_a_task_that_cannot_be_evaluated_is_tried_once_and_the_other_task_is_finished(tiny_project):
    tried, evaluate = [], evaluation.evaluate_examples

    def fails(model, tokenizer, examples, *more, name, **named):
        tried.append(name)
        if name == "sums":
            raise EvaluationError("no such metric")
        return evaluate(model, tokenizer, examples, *more, name=name, **named)

    recipes = tiny_project.settings["recipes"]
    tiny_project.settings["recipes"] = [each for each in recipes if each["name"] in ("random", "base")]
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(evaluation, "evaluate_examples", fails)
            with pytest.raises(EvaluationError, match="no such metric"):
                run(tiny_project.path, instance)
        assert sorted(tried) == ["sky", "sky", "sums", "sums"]
        assert instance.get_materialized_partitions(dg.AssetKey("task_results")) == {"sky"}
        left = run(tiny_project.path, instance).materialized
    assert left["task_results"] == ["sums"]
