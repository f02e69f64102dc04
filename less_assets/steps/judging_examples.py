"""Which examples judge a task: those of its validation and of its evaluation, and whether they are of one form.

Belongs here: reading them. Not here: taking losses of them (`validation.py`) or asking them (`evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from less_assets.project.project import Project
from less_assets.project.task_sections import Task

if TYPE_CHECKING:
    from less_assets.method.data.targets import EvaluationExample, TargetExample

OTHER_FORM = 3.0
"""Evaluation answers that are so many times longer or shorter than the targets' completions are of another form ..."""
SHORT_ANSWER = 40
"""... unless both are short: words, names, numbers of up to so many characters."""


def validation_examples(project: Project, task: Task) -> list[TargetExample]:
    """The examples that validate a task's selections: a fold's own, those of the task's file, or none.

    Args:
        project: The project file.
        task: A task with examples, or one without a fold (`Project.task` of the fold's key).

    Raises:
        TargetFormatError: The file cannot be read, or there are too few examples for so many folds.
    """
    from less_assets.method.data.folds import folds_of
    from less_assets.method.data.targets import read_targets

    examples = task.examples
    assert examples is not None
    if fold := project.folds.get(task.name):
        targets = read_targets(examples.format, examples.path)
        numbers = folds_of([target.subtask for target in targets], fold.folds)
        return [target for target, number in zip(targets, numbers, strict=True) if number == fold.number - 1]
    if task.validation and task.validation.path:
        return read_targets(examples.format, task.validation.path)
    return []


def validation_questions(task: Task, examples: Sequence[TargetExample]) -> list[EvaluationExample]:
    """Validation examples as questions whose answers a rule grades; empty where none can.

    Of a benchmark's format the rule of that benchmark takes the answer out of the completion. Other examples are
    compared word by word where completions are short: names, numbers, a few words.
    """
    from less_assets.method.data.targets import MMLU_CHOICES, EvaluationExample
    from less_assets.method.evaluation.answers import RULES, RuleName

    assert task.examples is not None
    format = task.examples.format
    if format == "messages" and median(len(example.completion) for example in examples) > SHORT_ANSWER:
        return []
    rule: RuleName = "exact_match" if format == "messages" else format
    return [
        EvaluationExample(
            example.example_id,
            example.subtask,
            example.messages,
            example.assistant_prefix,
            [RULES[rule].extract(example.completion)],
            rule,
            example.completion,
            MMLU_CHOICES if rule == "mmlu" else (),
            example.tools,
        )
        for example in examples
    ]


def score_of_guessing(task: Task) -> float:
    """What guessing scores on a task's validation questions: a quarter where one of four choices is right."""
    return 0.25 if task.examples and task.examples.format == "mmlu" else 0.0


def is_validated(project: Project, task: Task) -> bool:
    """Whether there are examples that validate a task, or a task without a fold."""
    return task.name in project.folds or (task.validation is not None and task.validation.path is not None)


def evaluation_examples(task: Task) -> list[EvaluationExample]:
    """What a task without a harness asks: its held-out file, or a benchmark's own files."""
    from less_assets.method.data.targets import read_evaluation

    evaluated = task.evaluation
    assert evaluated is not None
    assert task.examples is not None
    return read_evaluation(
        evaluated.format or "messages",
        evaluated.path or str(evaluated.held_out),
        evaluated.limit,
        shots_path=task.examples.path if task.examples.format == evaluated.format else None,
        few_shot=evaluated.few_shot,
    )


def answers_of_another_form(task: Task) -> str | None:
    """Why a task's answer loss says little of its targets: the answers are of another form; None: they are not.

    Compared is the median length of the targets' completions and of the reference answers. Tasks of the harness bring
    data that only the harness can read: they are not compared.
    """
    from less_assets.method.data.targets import read_targets

    if task.evaluation is None or task.evaluation.harness is not None or task.examples is None:
        return None
    targets = median(len(example.completion) for example in read_targets(task.examples.format, task.examples.path))
    answers = median(len(example.completion) for example in evaluation_examples(task))
    ratio = max(targets, answers) / max(1, min(targets, answers))
    if ratio < OTHER_FORM or max(targets, answers) <= SHORT_ANSWER:
        return None
    return (
        f"{task.name}: target completions have {targets:.0f} characters (median), reference answers {answers:.0f}: "
        "rows that teach the one may raise the loss of the other"
    )
