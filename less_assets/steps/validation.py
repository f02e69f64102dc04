"""The validation loss: a fine-tuned model on examples of the targets' own form that its rows were not selected for.

Belongs here: which examples those are, and samples of their losses. Not here: evaluating answers (`evaluation.py`), and
selecting without a fold, which is what every asset does for the fold's key of the task axis.
"""

from collections.abc import Callable
from statistics import median
from typing import TYPE_CHECKING, Any

import polars as pl

from less_assets.compute.step import StepInputs
from less_assets.project.project import Project
from less_assets.project.sections import Task

if TYPE_CHECKING:
    from less_assets.method.data.targets import TargetExample

OTHER_FORM = 3.0
"""Evaluation answers that are so many times longer or shorter than the targets' completions are of another form ..."""
SHORT_ANSWER = 40
"""... unless both are short: words, names, numbers of up to so many characters."""


def validation_examples(project: Project, task: Task) -> "list[TargetExample]":
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


def is_validated(project: Project, task: Task) -> bool:
    """Whether there are examples that validate a task, or a task without a fold."""
    return task.name in project.folds or (task.validation is not None and task.validation.path is not None)


def validate(work: StepInputs, task: Task, model: Any, tokenizer: Any, on_progress: Callable[[int], Any]) -> Any:
    """Losses of a task's validation examples, as an `Evaluation` whose one metric is `validation_loss`.

    Examples are encoded as target examples are, for the model that was trained.
    """
    from less_assets.method.data.chat import encode_target
    from less_assets.method.evaluation.evaluation import Evaluation, held_out_loss, summarize, validation_samples

    settings = work.project.model
    examples = validation_examples(work.project, task)
    longest = (task.examples.max_length if task.examples else None) or settings.max_length
    encoded = [
        encode_target(example, tokenizer, chat_format=settings.chat_format, max_length=longest) for example in examples
    ]
    losses, tokens = held_out_loss(model, encoded, on_progress=on_progress)
    samples = validation_samples(examples, losses, tokens)
    return Evaluation(samples, summarize(samples, average="samples"))


def pooled_validation(parts: list[pl.DataFrame]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Samples of all folds of a task, and their metrics: each example was judged by a model that had not seen it."""
    from less_assets.method.evaluation.evaluation import summarize

    samples = pl.concat(parts)
    return samples, summarize(samples, average="samples")


def answers_of_another_form(task: Task) -> str | None:
    """Why a task's answer loss says little of its targets: the answers are of another form; None: they are not.

    Compared is the median length of the targets' completions and of the reference answers. Tasks of the harness bring
    data that only the harness can read: they are not compared.
    """
    from less_assets.method.data.targets import read_targets
    from less_assets.steps.evaluation import evaluation_examples

    if task.evaluation is None or task.evaluation.harness is not None or task.examples is None:
        return None
    targets = median(len(each.completion) for each in read_targets(task.examples.format, task.examples.path))
    answers = median(len(each.completion) for each in evaluation_examples(task))
    ratio = max(targets, answers) / max(1, min(targets, answers))
    if ratio < OTHER_FORM or max(targets, answers) <= SHORT_ANSWER:
        return None
    return (
        f"{task.name}: target completions have {targets:.0f} characters (median), reference answers {answers:.0f}: "
        "rows that teach the one may raise the loss of the other"
    )
