"""Every guardrail fires where it should and is silent where it should not, on one tiny project."""

import re

import dagster as dg
import pytest
from support.graph import run
from support.tiny import TinyProject, question, write_rows

from less_assets.running.runner import Request


class Checked:
    """A tiny project on an instance that remembers what its checks said."""

    def __init__(self, project: TinyProject, instance: dg.DagsterInstance) -> None:
        self.tiny, self.instance = project, instance

    def run(self, request: Request = Request()) -> None:  # noqa: B008 - immutable
        run(self.tiny.path, self.instance, request)

    def said(self, asset: str, name: str, partition: str | None = None) -> tuple[bool, str]:
        """Whether the check last passed for a partition, and its words."""
        history = self.instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(dg.AssetKey(asset), name), limit=100
        )
        for record in history:
            found = record.event.dagster_event.event_specific_data
            if partition is None or record.partition == partition:
                return found.passed, found.description
        raise AssertionError(f"{name} was never run for {partition}")


@pytest.fixture(scope="module")
def checked(tmp_path_factory, tiny_model):
    """Two controls: `sums` is none in truth and overlaps with everything, `sky` is a real one and clean."""
    project = TinyProject(tmp_path_factory.mktemp("guardrails"), tiny_model)
    folder = project.folder
    long = {"role": "assistant", "content": "blue sea " * 4}
    write_rows(folder / "data/colors.jsonl", [[question(place, "red")[0], long] for place in range(40)])
    red = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    write_rows(folder / "targets/sky.jsonl", [red])
    targets = [("plus", "plus", "part-0"), ("plus plus", "plus", "part-0"), ("z y x", "w", "part-1")]
    sums = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], "subtask": subtask}
        for asked, said, subtask in targets
    ]
    write_rows(folder / "targets/sums.jsonl", sums)
    held_out = [question(3, "plus"), sums[1]["messages"], *(question(310 + place, "plus") for place in range(6))]
    write_rows(folder / "held_out/sums.jsonl", held_out)
    write_rows(folder / "held_out/sky.jsonl", [question(320 + place, "plus") for place in range(4)])
    for task in project.settings["tasks"]:
        task["control"] = True
    project.settings["recipes"] = [
        {"name": "max", "strategy": "bm25", "rows": 12, "aggregate": "max"},
        {"name": "turns", "strategy": "bm25", "rows": 12},
        {"name": "random", "strategy": "random", "rows": 12},
        {"name": "base", "strategy": "none"},
    ]
    project.settings["finetuning"] = {"epochs": 15, "learning_rate": 2e-2, "batch_size": 4}
    with dg.DagsterInstance.ephemeral() as instance:
        found = Checked(project, instance)
        found.run()
        yield found


def test_evaluated_rows_in_the_pool_are_told_by_task(checked):
    passed, words = checked.said("pool_index", "evaluation_not_in_pool")
    assert not passed
    assert words == "sums: 1 pool rows overlap with 1 evaluated ones (1 are the same)"


def test_target_examples_that_are_evaluated_are_told(checked):
    assert checked.said("target_examples", "targets_not_evaluated", "sums")[1] == (
        "1 of 3 target examples are in the evaluation."
    )
    assert not checked.said("target_examples", "targets_not_evaluated", "sums")[0]
    assert checked.said("target_examples", "targets_not_evaluated", "sky")[0]


def test_one_subtask_that_wins_most_is_told(checked):
    passed, words = checked.said("selected_subset", "no_subtask_dominates", "max|sums")
    assert not passed
    assert words == (
        "sums/part-0 has won 12 of 12 selected rows (100%; an even share is 50%); `aggregate: round_robin` takes turns."
    )
    assert checked.said("selected_subset", "no_subtask_dominates", "turns|sums")[0]


def test_a_selection_of_very_short_answers_is_told(checked):
    passed, words = checked.said("selected_subset", "not_only_very_short_rows", "max|sums")
    assert not passed
    assert words == "100% of the selected answers have at most 20 characters, 38% of the pool's."
    assert checked.said("selected_subset", "not_only_very_short_rows", "max|sky")[0]
    assert checked.said("selected_subset", "not_only_very_short_rows", "base|sums")[0]


def test_a_control_that_profits_is_told(checked):
    passed, words = checked.said("task_results", "control_does_not_profit", "sums")
    assert not passed
    assert "max (answer loss -" in words
    assert checked.said("task_results", "control_does_not_profit", "sky") == (
        True,
        "No recipe beats random on the control.",
    )


def test_the_leaderboard_is_a_table_and_pictures_in_the_ui(checked):
    event = checked.instance.get_latest_materialization_event(dg.AssetKey("leaderboard"))
    shown = event.asset_materialization.metadata
    headings = re.findall(r"^\*\*([\w -]+?) ?[,(]", shown["results"].value, re.MULTILINE)
    assert headings == ["Answer loss", "Score", "Difference from random", "Difference from base", "Cost"]
    for name in ("answer_loss", "score", "answer_loss_against_random", "score_against_random"):
        assert "data:image/png;base64," in shown[name].value


def test_a_model_below_the_base_is_told(checked):
    passed, words = checked.said("eval_results", "not_worse_than_base", "max|sums")
    assert passed
    assert words.startswith("Not worse than the base model: sums answer loss"), "the base model comes first"
    assert checked.said("task_results", "no_recipe_below_base", "sums") == (True, "No recipe is below the base model.")
    checked.tiny.settings["finetuning"] = {"epochs": 2, "learning_rate": 5.0, "batch_size": 4}
    checked.tiny.settings["recipes"] = checked.tiny.settings["recipes"][::3]
    checked.tiny.settings["tasks"] = checked.tiny.settings["tasks"][:1]
    checked.tiny.settings["tasks"][0]["control"] = False
    checked.run(Request(until="task_results"))
    passed, words = checked.said("eval_results", "not_worse_than_base", "max|sums")
    assert not passed
    assert "Worse than the base model: sums answer loss" in words
    passed, words = checked.said("task_results", "no_recipe_below_base", "sums")
    assert not passed
    assert words.startswith("Worse than the base model on the same samples: max (answer loss +")
    assert checked.said("task_results", "control_does_not_profit", "sums") == (True, "The task is no control.")
