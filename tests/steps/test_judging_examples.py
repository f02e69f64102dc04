"""Whether reference answers are of the targets' form, which decides whether their loss takes part in verdicts."""

import json
from pathlib import Path

import pytest

from less_assets.method.data.targets import TargetExample
from less_assets.project.project import load_project
from less_assets.project.task_sections import Task
from less_assets.steps.judging_examples import (
    answers_of_another_form,
    score_of_guessing,
    validation_examples,
    validation_questions,
)

PROJECT = """
name: p
model: {base: owner/model}
pool: {sources: [{name: s, path: s.jsonl}]}
tasks:
  - name: t
    examples: {path: targets.jsonl}
    evaluation: {held_out: held-out.jsonl}
    validation: {folds: 2}
  - {name: asked, examples: {path: targets.jsonl}, evaluation: {harness: gsm8k}}
  - {name: unasked, examples: {path: targets.jsonl}}
recipes: [{name: full, strategy: full}]
"""


def project(folder: Path, targets: list[str], answers: list[str]):
    for name, completions in (("targets.jsonl", targets), ("held-out.jsonl", answers)):
        rows = [
            {"messages": [{"role": "user", "content": f"{name} {place}"}, {"role": "assistant", "content": text}]}
            for place, text in enumerate(completions)
        ]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "project.yaml").write_text(PROJECT)
    return load_project(folder / "project.yaml")


@pytest.mark.parametrize(
    ("targets", "answers", "other"),
    [
        (["because of this and that, the answer is 4 " * 4], ["So the answer is 4."], True),
        (["So the answer is 4."], ["because of this and that, the answer is 4 " * 4], True),
        (["because of this and that, the answer is 4"], ["it follows from these two facts that it is five"], False),
        (["A"], ["Barack Obama, the president"], False),
    ],
)
def test_answers_much_longer_or_shorter_than_targets_are_of_another_form(tmp_path, targets, answers, other):
    task = project(tmp_path, targets * 2, answers).task("t")
    why = answers_of_another_form(task)
    assert bool(why) is other
    assert not other or "characters (median)" in why


def test_what_cannot_be_compared_is_not_said_to_differ(tmp_path):
    loaded = project(tmp_path, ["long " * 40] * 2, ["short"])
    assert answers_of_another_form(loaded.task("asked")) is None
    assert answers_of_another_form(loaded.task("unasked")) is None


def test_the_folds_of_a_task_hold_each_of_its_examples_once(tmp_path):
    loaded = project(tmp_path, ["a", "b", "c"], ["a"])
    parts = [validation_examples(loaded, loaded.task(key)) for key in loaded.folds_of("t")]
    assert sorted(example.completion for part in parts for example in part) == ["a", "b", "c"]
    assert [len(part) for part in parts] == [2, 1]
    assert validation_examples(loaded, loaded.task("t")) == []


@pytest.mark.parametrize(
    ("format", "completion", "answer", "choices", "guessing"),
    [
        ("bbh", " First this, then that. So the answer is (B).", "(B)", (), 0.0),
        ("gsm8k", "2 and 3 make 5. The answer is 1,005.", "1005", (), 0.0),
        ("tydiqa", " the Nile", "the Nile", (), 0.0),
        ("mmlu", " C", "C", (" A", " B", " C", " D"), 0.25),
        ("messages", "Open Settings.", "Open Settings.", (), 0.0),
    ],
)
def test_validation_examples_are_questions_with_the_answer_of_their_completion(
    format, completion, answer, choices, guessing
):
    task = Task.model_validate({"name": "t", "examples": {"path": "t", "format": format}})
    example = TargetExample("1", "s", [{"role": "user", "content": "?"}], "A:", completion)
    (question,) = validation_questions(task, [example])
    assert (question.answers, question.choices, question.completion) == ([answer], choices, completion)
    assert (question.messages, question.assistant_prefix) == (example.messages, "A:")
    assert score_of_guessing(task) == guessing


def test_long_answers_of_no_format_cannot_be_graded():
    task = Task.model_validate({"name": "t", "examples": {"path": "t"}})
    example = TargetExample("1", "s", [{"role": "user", "content": "?"}], "", "a whole paragraph " * 5)
    assert validation_questions(task, [example]) == []
