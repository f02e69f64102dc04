"""Validation: selections are judged on examples of the targets' own form that they were not made for."""

import dagster as dg
import numpy as np
import polars as pl
import pytest
from support.graph import run
from support.tiny import TinyProject, question, write_rows

from less_assets.lineage.lineage import Lineage
from less_assets.method.evaluation.leaderboard import of_number
from less_assets.project.project import load_project
from less_assets.reading.files import BOARD, METRICS, SAMPLES, SUBSET, TARGET_FEATURES, TARGETS, score_file
from less_assets.running.runner import Request
from less_assets.steps.fairness_checks import losses_speak_of_the_targets
from less_assets.steps.registry import open_lineage, open_store
from less_assets.store.tables import read_parquet

FOLDS = ["sums.fold-1", "sums.fold-2"]
WORKED = "so the first is one and the next is two and the third is three and the answer is "


class Made:
    """A tiny project run to its end, and what it has stored."""

    def __init__(self, project: TinyProject, instance: dg.DagsterInstance) -> None:
        self.tiny, self.instance = project, instance

    def run(self, request: Request | None = None) -> dict[str, list]:
        return run(self.tiny.path, self.instance, request or Request()).materialized

    @property
    def lineage(self) -> Lineage:
        project = load_project(self.tiny.path)
        return open_lineage(project, open_store(project))

    def table(self, asset: str, partition: str | None, file: str) -> pl.DataFrame:
        return read_parquet(self.lineage.folder(asset, partition), file)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model):
    """One task with folds, whose answers are of another form than its targets; one with a file; a group of both."""
    project = TinyProject(tmp_path_factory.mktemp("validation"), tiny_model)
    targets = []
    for place in range(5):
        messages = question(200 + place, "plus")
        messages[1]["content"] = WORKED + messages[1]["content"]
        targets.append({"messages": messages, "subtask": f"part-{place % 2}"})
    targets.append(targets[0])  # stands twice
    write_rows(project.folder / "targets/sums.jsonl", targets)
    write_rows(project.folder / "validation.jsonl", [question(600 + place, "red") for place in range(3)])
    tasks = project.settings["tasks"]
    tasks[0]["validation"] = {"folds": 2}
    tasks[1]["validation"] = {"path": "validation.jsonl"}
    tasks.append({"name": "both", "members": ["sums", "sky"]})
    project.settings["model"]["max_length"] = 64
    project.settings["recipes"] = [
        {"name": "less", "strategy": "less", "fraction": 0.2},
        {"name": "random", "strategy": "random", "fraction": 0.2},
        {"name": "rds", "strategy": "rds", "rows": 5},
        {"name": "base", "strategy": "none"},
    ]
    with dg.DagsterInstance.ephemeral() as instance:
        found = Made(project, instance)
        found.first = found.run()
        yield found


def test_each_fold_has_a_selection_that_never_saw_what_it_is_judged_on(made):
    judged = []
    for fold in FOLDS:
        kept = set(made.table("target_examples", fold, TARGETS)["example_id"])
        samples = made.table("eval_results", f"less|{fold}", SAMPLES)
        assert not kept & set(samples["example_id"])
        judged += samples["example_id"].to_list()
        assert made.table("selected_subset", f"less|{fold}", SUBSET).height == 8
    assert sorted(judged) == sorted(made.table("target_examples", "sums", TARGETS)["example_id"])


def test_scores_without_a_fold_are_those_of_the_stored_gradients_of_the_others(made):
    whole = made.table("target_gradients", "epoch-2|sums", TARGET_FEATURES)
    for fold in FOLDS:
        kept = made.table("target_examples", fold, TARGETS)["example_id"].to_list()
        features = made.table("target_gradients", f"epoch-2|{fold}", TARGET_FEATURES)
        assert features["example_id"].to_list() == kept
        assert features.equals(whole.filter(pl.col("example_id").is_in(kept)))
    shard = made.lineage.shards()[0]
    first, second = (made.table("influence_scores", fold, score_file(shard))["marginal.mean_cosine"] for fold in FOLDS)
    assert not first.equals(second)


def test_what_does_not_look_at_the_targets_is_trained_once_for_all_folds(made):
    lineage = made.lineage
    models = {str(lineage.folder("finetuned_model", f"random-seed0|{task}").root) for task in ["sums", *FOLDS]}
    assert len(models) == 1
    models = {str(lineage.folder("finetuned_model", f"less|{task}").root) for task in ["sums", *FOLDS]}
    assert len(models) > 1


def test_folds_are_pooled_into_one_validation_loss(made):
    board = made.table("leaderboard", None, BOARD)
    validation = of_number(board, "validation_loss")
    assert validation["task"].unique(maintain_order=True).to_list() == ["sums", "sky", "both/sky"]
    assert validation.filter(task="sums")["n"].to_list() == [6] * 4
    losses = np.concatenate(
        [
            [scores[0]["value"] for scores in made.table("eval_results", f"less|{fold}", SAMPLES)["scores"]]
            for fold in FOLDS
        ]
    )
    less = validation.filter(task="sums", recipe="less").row(0, named=True)
    assert less["value"] == pytest.approx(losses.mean())
    assert less["vs_random"] is not None
    assert less["decides"]
    assert not set(FOLDS) & set(board["task"])
    assert not any(fold in name for fold in FOLDS for name in made.first.get("task_results", []))


def test_a_file_of_validation_examples_judges_the_task_and_the_groups_it_is_in(made):
    for key in ("less|sky", "less|both"):
        metrics = made.table("eval_results", key, METRICS)
        own = metrics.filter(pl.col("metric") == "validation_loss", pl.col("subtask").is_null())
        assert own["task"].to_list() == ["sky"]
        assert own["n"].to_list() == [3]
    target_ids = set(made.table("target_examples", "sky", TARGETS)["example_id"])
    samples = made.table("eval_results", "less|sky", SAMPLES).filter(pl.col("metric").is_null())
    assert samples.height == 3
    assert not target_ids & set(samples["example_id"])


def test_answers_of_another_form_take_part_in_no_verdict_and_a_check_says_why(made):
    board = made.table("leaderboard", None, BOARD)
    answers = of_number(board, "answer_loss")
    assert set(answers.filter(task="sums")["decides"]) == {False}
    assert set(answers.filter(task="sky")["decides"]) == {True}
    verdict = losses_speak_of_the_targets.judge(made.lineage, "sums", None, print)
    assert not verdict.passed
    assert "differ in form" in verdict.said
    assert "6 validation examples; few" in verdict.said
    assert losses_speak_of_the_targets.judge(made.lineage, "sky", None, print).passed


def test_nothing_is_explained_for_a_fold_and_nothing_is_made_twice(made):
    for asset in ("token_attribution", "selection_report", "task_results"):
        assert not any(".fold-" in str(key) for key in made.first[asset])
    assert made.run() == {}


def test_other_validation_examples_cost_evaluations_and_nothing_else(made):
    before = str(made.lineage.folder("target_gradients", "epoch-1|sky").root)
    write_rows(made.tiny.folder / "validation.jsonl", [question(700 + place, "red") for place in range(2)])
    again = made.run(Request(tasks=("sky",)))
    assert not {"influence_scores", "selected_subset", "finetuned_model"} & set(again)
    assert str(made.lineage.folder("target_gradients", "epoch-1|sky").root) == before
    assert sorted(again["eval_results"]) == ["base|sky", "less|sky", "random-seed0|sky", "rds|sky"]
