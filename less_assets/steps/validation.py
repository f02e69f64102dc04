"""The validation loss: a fine-tuned model on examples of the targets' own form that its rows were not selected for.

Belongs here: samples of their losses. Not here: which examples those are (`judging_examples.py`), evaluating answers
(`evaluation.py`), and selecting without a fold, which is what every asset does for the fold's key of the task axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import polars as pl

from less_assets.compute.step import StepInputs
from less_assets.project.task_sections import Task
from less_assets.steps.judging_examples import validation_examples, validation_questions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from less_assets.method.evaluation.evaluation import Evaluation


def validate(
    work: StepInputs,
    task: Task,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Callable[[int], None],
) -> Evaluation:
    """Losses of a task's validation examples, as an `Evaluation` whose one metric is `validation_loss`."""
    from less_assets.method.evaluation.evaluation import Evaluation, summarize

    samples, _ = validation_losses(work, task, model, tokenizer, on_progress)
    return Evaluation(samples, summarize(samples, average="samples"))


def validation_losses(
    work: StepInputs,
    task: Task,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    on_progress: Callable[[int], None],
) -> tuple[pl.DataFrame, int]:
    """A task's validation examples as samples with their losses (`SAMPLE_SCHEMA`), and their tokens.

    Examples are encoded as target examples are, for the model that was trained.
    """
    from less_assets.method.evaluation.evaluation import held_out_loss, validation_samples

    encoder = work.models.encoder(tokenizer)
    examples = validation_examples(work.project, task)
    longest = (task.examples.max_length if task.examples else None) or encoder.max_length
    encoded = [encoder.target(example, longest) for example in examples]
    losses, tokens = held_out_loss(model, encoded, on_progress=on_progress)
    return validation_samples(examples, losses, tokens), sum(len(example.input_ids) for example in encoded)


def validation_scores(
    work: StepInputs, task: Task, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """The score of the model's answer to each validation example, 0 to 1; empty where they cannot be graded.

    They are asked as evaluations are, with the rule's own limits.
    """
    from less_assets.method.evaluation.evaluation import EvaluationSettings, evaluate_examples

    questions = validation_questions(task, validation_examples(work.project, task))
    if not questions:
        return []
    model_settings = work.project.model
    longest = (task.examples.max_length if task.examples else None) or model_settings.max_length
    settings = EvaluationSettings(chat_format=model_settings.chat_format, date=model_settings.date, max_length=longest)
    requests = sum(max(1, len(question.choices)) for question in questions)
    progress = work.progress(requests, "validation questions")
    judged = evaluate_examples(model, tokenizer, questions, settings, name=task.name, on_progress=progress)
    return judged.samples["score"].to_list()


def pooled_validation(parts: list[pl.DataFrame]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Samples of all folds of a task, and their metrics: each example was judged by a model that had not seen it."""
    from less_assets.method.evaluation.evaluation import summarize

    samples = pl.concat(parts)
    return samples, summarize(samples, average="samples")
