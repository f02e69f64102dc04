"""The validation loss: a fine-tuned model on examples of the targets' own form that its rows were not selected for.

Belongs here: samples of their losses. Not here: which examples those are (`judging_examples.py`), evaluating answers
(`evaluation.py`), and selecting without a fold, which is what every asset does for the fold's key of the task axis.
"""

from collections.abc import Callable
from typing import Any

import polars as pl

from less_assets.compute.step import StepInputs
from less_assets.project.task_sections import Task
from less_assets.steps.judging_examples import validation_examples


def validate(work: StepInputs, task: Task, model: Any, tokenizer: Any, on_progress: Callable[[int], Any]) -> Any:
    """Losses of a task's validation examples, as an `Evaluation` whose one metric is `validation_loss`.

    Examples are encoded as target examples are, for the model that was trained.
    """
    from less_assets.method.evaluation.evaluation import Evaluation, held_out_loss, summarize, validation_samples

    encoder = work.models.encoder(tokenizer)
    examples = validation_examples(work.project, task)
    longest = (task.examples.max_length if task.examples else None) or encoder.max_length
    encoded = [encoder.target(example, longest) for example in examples]
    losses, tokens = held_out_loss(model, encoded, on_progress=on_progress)
    samples = validation_samples(examples, losses, tokens)
    return Evaluation(samples, summarize(samples, average="samples"))


def pooled_validation(parts: list[pl.DataFrame]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Samples of all folds of a task, and their metrics: each example was judged by a model that had not seen it."""
    from less_assets.method.evaluation.evaluation import summarize

    samples = pl.concat(parts)
    return samples, summarize(samples, average="samples")
