"""How good a model is on a task: answer loss, graded answers, and what the numbers are worth.

Belongs here: evaluation examples, the harness task made from them, and the tables of samples and metrics. Running the
model lives in `generation.py` and `harness.py`, grading in `answers.py`, the bootstrap in `intervals.py`.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
from torch.nn.functional import cross_entropy

from less_assets.errors import EvaluationError
from less_assets.method import DEFAULT_DATE
from less_assets.method.data.chat import IGNORED, ChatEncoder, ChatFormat, EncodedExample
from less_assets.method.data.targets import EvaluationExample, TargetExample
from less_assets.method.evaluation import LOSSES, VALIDATION_LOSS
from less_assets.method.evaluation.answers import RULES, AnswerRule, RuleName
from less_assets.method.evaluation.generation import logits_at
from less_assets.method.evaluation.harness_samples import (
    averaged_metrics,
    figure_rows,
    logged_rows,
    most_likely,
    sample_row,
)
from less_assets.method.evaluation.intervals import CONFIDENCE, REPLICATES, clustered_bootstrap

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A generation needs some room beyond the longest reference: models put words before the answer.
SPARE_NEW_TOKENS = 8

_SCORES: Any = pl.List(pl.Struct({"metric": pl.String, "value": pl.Float64}))

SAMPLE_SCHEMA = pl.Schema(
    {
        "example_id": pl.String,  # id of the evaluation example (harness tasks: hash of the document)
        "subtask": pl.String,
        "prompt": pl.String,  # as the model saw it, special tokens included
        "output": pl.String,  # generated text, or the chosen continuation
        "answer": pl.String,  # extracted from the output; what was graded
        "reference": pl.String,  # accepted answers, one a line
        "metric": pl.String,  # name of the score
        "score": pl.Float64,  # the task's first metric, 0 to 1
        "correct": pl.Boolean,  # score is 1
        "scores": _SCORES,  # every metric
        "loss": pl.Float64,  # nats per loss token of the reference completion; null if it has none
        "loss_tokens": pl.Int64,
    }
)

METRIC_SCHEMA = pl.Schema(
    {
        "metric": pl.String,  # loss, exact_match, f1, accuracy, …
        "subtask": pl.String,  # null: the whole task
        "value": pl.Float64,
        "low": pl.Float64,  # bootstrap interval; null where the harness reports a figure without samples
        "high": pl.Float64,
        "n": pl.Int64,  # samples
        "higher_is_better": pl.Boolean,
        "primary": pl.Boolean,  # the task's score: the first metric
        "average": pl.String,  # what counts the same in a total: samples or subtasks
    }
)


@dataclass(frozen=True)
class EvaluationSettings:
    """How examples are asked and graded.

    Attributes:
        rule: Name of the rule in `answers.RULES` that extracts and grades; None: the examples' own.
        max_new_tokens: Longest generation in tokens; None: the rule's, or enough for the longest reference.
        chat_format: How turns become text; see `chat.ChatEncoder`.
        date: The day that a chat template is told which asks for it.
        max_length: Longest prompt and completion together, in tokens; prompts are cut from the left. None: the model's
            context.
        token_budget: Padded tokens per batch.
        replicates: Bootstrap replicates.
        confidence: Coverage of the intervals.
        seed: Seed of the bootstrap and of few-shot sampling.
    """

    rule: RuleName | None = None
    max_new_tokens: int | None = None
    chat_format: ChatFormat = "template"
    date: datetime.date = DEFAULT_DATE
    max_length: int | None = None
    token_budget: int = 4096
    replicates: int = REPLICATES
    confidence: float = CONFIDENCE
    seed: int = 0


@dataclass(frozen=True)
class Evaluation:
    """Every sample (`SAMPLE_SCHEMA`) and the metrics per subtask and in all (`METRIC_SCHEMA`)."""

    samples: pl.DataFrame
    metrics: pl.DataFrame


def held_out_loss(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[EncodedExample],
    *,
    token_budget: int = 4096,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return each example's mean cross-entropy over its loss tokens, in nats, and how many those are.

    A diverged model gives NaN or infinite losses, which are returned as they are.

    Args:
        model: A causal language model, with or without an adapter.
        examples: Encoded examples with unshifted labels (-100: no loss).
        token_budget: Padded tokens per batch.
        on_progress: Called with the number of examples done since the last call.

    Returns:
        Losses float64 (n,) and loss tokens int64 (n,), in the order given.

    Raises:
        EvaluationError: If an example has no loss token.
    """
    positions = [np.flatnonzero(np.asarray(example.labels)[1:] != IGNORED) for example in examples]
    for example, wanted in zip(examples, positions, strict=True):
        if len(wanted) == 0:
            raise EvaluationError("An evaluation example has no token to take the loss of.", where=example.example_id)
    losses = np.empty(len(examples))
    scored = logits_at(
        model,
        [example.input_ids for example in examples],
        positions,
        token_budget=token_budget,
    )
    for i, logits in scored:
        labels = logits.new_tensor(np.asarray(examples[i].labels)[1:][positions[i]]).long()
        losses[i] = float(cross_entropy(logits, labels))
        if on_progress:
            on_progress(1)
    return losses, np.array([len(wanted) for wanted in positions], dtype=np.int64)


def evaluate_examples(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EvaluationExample],
    settings: EvaluationSettings | None = None,
    *,
    name: str = "held_out",
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate held-out examples: loss of the reference completion, and graded answers through the harness.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        examples: What to ask; at least one, all graded by the same rule.
        settings: How to ask and grade.
        name: Name of the generated harness task.
        on_progress: Called with the number of requests done since the last call; an example is one request, or one per
            choice where choices are compared.

    Raises:
        EvaluationError: If there is nothing to evaluate, or an example cannot be asked.
    """
    from less_assets.method.evaluation.harness import (  # lm_eval takes seconds to import
        HarnessModel,
        load_task,
        run_tasks,
    )

    settings = settings or EvaluationSettings()
    if not examples:
        raise EvaluationError("There are no evaluation examples.", where=name, fix="give a file with at least one row")
    rule = _common_rule(examples, settings, name)
    new_tokens = settings.max_new_tokens or rule.max_new_tokens or _longest_reference(examples, tokenizer)
    max_length = _max_length(model, settings)
    encoder = ChatEncoder(tokenizer, settings.chat_format, max_length, settings.date)
    prompts, encodings = _encode_requests(examples, encoder)
    lm = HarnessModel(
        model,
        tokenizer,
        max_length=min(max_length + new_tokens, _context_length(model)),
        token_budget=settings.token_budget,
        encodings=encodings,
        on_progress=on_progress,
    )
    tasks = load_task(harness_task(name, examples, prompts, rule, max_new_tokens=new_tokens))
    logged = sorted(run_tasks(lm, tasks, seed=settings.seed)["samples"][name], key=lambda sample: sample["doc_id"])

    records = []
    for example, prompt, sample in zip(examples, prompts, logged, strict=True):
        output, answer = _output_and_answer(example, rule, sample)
        loss_tokens = len(encodings[prompt, example.completion][1])
        if example.choices:
            loss = -sample["resps"][example.choices.index(example.completion)][0][0] / loss_tokens
        else:
            loss = lm.reference_losses[prompt, example.completion]
        scores = {metric: float(sample[metric]) for metric in rule.metrics}
        records.append(
            sample_row(
                example_id=example.example_id,
                subtask=example.subtask,
                prompt=prompt,
                output=output,
                answer=answer,
                reference="\n".join(example.answers),
                scores=scores,
                loss=loss,
                loss_tokens=loss_tokens,
            )
        )
    samples = pl.DataFrame(records, schema=SAMPLE_SCHEMA)
    return Evaluation(samples, summarize(samples, average=rule.average, settings=settings))


def validation_samples(examples: Sequence[TargetExample], losses: np.ndarray, loss_tokens: np.ndarray) -> pl.DataFrame:
    """Validation examples as samples: their loss is a score of its own name, for it is no loss of answers.

    Args:
        examples: n examples of the targets' form.
        losses: float64 (n,), as `held_out_loss` gives them.
        loss_tokens: int64 (n,).

    Returns:
        `SAMPLE_SCHEMA`, with neither prompt nor output.
    """
    records = [
        {
            "example_id": example.example_id,
            "subtask": example.subtask,
            "reference": example.completion,
            "scores": [{"metric": VALIDATION_LOSS, "value": float(loss)}],
            "loss_tokens": int(tokens),
        }
        for example, loss, tokens in zip(examples, losses, loss_tokens, strict=True)
    ]
    return pl.DataFrame(records, schema=SAMPLE_SCHEMA)


def harness_task(
    name: str,
    examples: Sequence[EvaluationExample],
    prompts: Sequence[str],
    rule: AnswerRule,
    *,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Return a harness task, as a dictionary, that asks the examples and grades them by the rule.

    Args:
        name: Name of the task.
        examples: All with choices (compared by likelihood), or all without (answered by generation).
        prompts: Full prompt text of each example.
        rule: Extraction (the task's filter) and metrics.
        max_new_tokens: Longest generation in tokens.

    Raises:
        EvaluationError: If some examples have choices and some have not.
    """
    if len({bool(example.choices) for example in examples}) > 1:
        raise EvaluationError("Some evaluation examples have choices and some have not.", where=name)
    documents = [
        {
            "example_id": example.example_id,
            "subtask": example.subtask,
            "prompt": prompt,
            "answers": list(example.answers),
            "choices": list(example.choices),
            "gold": example.completion,
        }
        for example, prompt in zip(examples, prompts, strict=True)
    ]

    def dataset(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(documents)}

    shared = {
        "task": name,
        "custom_dataset": dataset,
        "test_split": "test",
        "doc_to_text": lambda document: document["prompt"],
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in rule.metrics],
        "target_delimiter": "",
        "metadata": {"version": 1},
    }
    if examples[0].choices:
        return {
            **shared,
            "output_type": "multiple_choice",
            "doc_to_choice": lambda document: document["choices"],
            "doc_to_target": lambda document: document["choices"].index(document["gold"]),
            "process_results": lambda document, results: rule.grade(
                rule.extract(document["choices"][most_likely(results)]), document["answers"]
            ),
        }
    return {
        **shared,
        "output_type": "generate_until",
        "doc_to_target": lambda document: document["gold"],
        "generation_kwargs": {"until": list(rule.stop), "max_gen_toks": max_new_tokens, "do_sample": False},
        "filter_list": [
            {
                "name": "answer",
                "filter": [
                    {
                        "function": "custom",
                        "filter_fn": lambda outputs, _: [[rule.extract(texts[0])] for texts in outputs],
                    },
                    {"function": "take_first"},
                ],
            }
        ],
        "process_results": lambda document, results: rule.grade(results[0], document["answers"]),
    }


def evaluate_with_harness(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str | Path | Mapping[str, Any],
    settings: EvaluationSettings | None = None,
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Evaluate an lm-evaluation-harness task; its leaf tasks are the subtasks.

    The loss is that of the reference continuation after the harness's own prompt. Metrics that the harness does not
    average over samples (perplexities, corpus F1) appear with its own figure and without an interval.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: Its tokenizer.
        task: Name of a harness task, group or tag; path of a YAML file; or the task as a dictionary.
        settings: `max_length`, `token_budget` and the bootstrap's settings apply; the rest is the task's own.
        include_path: Folder with the user's own task YAML files.
        limit: First examples of each leaf task only; None: all.
        num_fewshot: Overrides the task's number of examples.
        apply_chat_template: Put the prompts into the tokenizer's chat template.
        on_progress: Called with the number of requests done since the last call.

    Raises:
        EvaluationError: If the task cannot be loaded, or its data cannot be had.
    """
    from less_assets.method.evaluation.harness import (  # lm_eval takes seconds to import
        HarnessModel,
        load_task,
        run_tasks,
    )

    settings = settings or EvaluationSettings()
    tasks = load_task(task, include_path)
    lm = HarnessModel(
        model,
        tokenizer,
        max_length=_max_length(model, settings),
        token_budget=settings.token_budget,
        date=settings.date,
        on_progress=on_progress,
    )
    result = run_tasks(
        lm,
        tasks,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        seed=settings.seed,
    )
    records: list[dict[str, Any]] = []
    figures: list[dict[str, Any]] = []
    for name, leaf in tasks.items():
        averaged = averaged_metrics(leaf)
        records += logged_rows(name, leaf, result["samples"][name], averaged, lm)
        figures += figure_rows(name, result["results"][name], averaged, leaf.higher_is_better())
    samples = pl.DataFrame(records, schema=SAMPLE_SCHEMA)
    metrics = summarize(samples, average="samples", settings=settings)
    return Evaluation(samples, pl.concat([metrics, pl.DataFrame(figures, schema=METRIC_SCHEMA)]))


def summarize(
    samples: pl.DataFrame, *, average: Literal["samples", "subtasks"], settings: EvaluationSettings | None = None
) -> pl.DataFrame:
    """Return each metric's mean with its interval, for the whole task (subtask null) and for every subtask.

    Args:
        samples: Table of `SAMPLE_SCHEMA`.
        average: Whether samples or subtasks count the same in the total.
        settings: Bootstrap settings.

    Returns:
        Table of `METRIC_SCHEMA`; the loss first, then metrics in the task's order; totals before subtasks.
    """
    settings = settings or EvaluationSettings()
    long = pl.concat(
        [
            samples.select("subtask", pl.lit("loss").alias("metric"), pl.col("loss").alias("value")).drop_nulls(),
            samples.select("subtask", "scores")
            .filter(pl.col("scores").list.len() > 0)
            .explode("scores")
            .unnest("scores"),
        ],
        how="diagonal",
    )
    primary = samples["metric"].drop_nulls().unique()
    rows = []
    for (metric,), values in long.group_by("metric", maintain_order=True):
        parts = [(None, values), *((key[0], part) for key, part in values.group_by("subtask", maintain_order=True))]
        for subtask, part in parts:
            interval = clustered_bootstrap(
                part["value"].to_numpy(),
                part["subtask"].to_list(),
                average=average,
                replicates=settings.replicates,
                confidence=settings.confidence,
                seed=settings.seed,
            )
            rows.append(
                {
                    "metric": metric,
                    "subtask": subtask,
                    "value": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "n": len(part),
                    "higher_is_better": metric not in LOSSES,
                    "primary": metric in primary,
                    "average": average,
                }
            )
    return pl.DataFrame(rows, schema=METRIC_SCHEMA)


def _common_rule(examples: Sequence[EvaluationExample], settings: EvaluationSettings, name: str) -> AnswerRule:
    rules = {settings.rule} if settings.rule else {example.metric for example in examples}
    if len(rules) > 1:
        raise EvaluationError(
            f"Evaluation examples of different kinds cannot be mixed: {', '.join(sorted(rules))}.", where=name
        )
    return RULES[rules.pop()]


def _encode(example: EvaluationExample, completion: str, encoder: ChatEncoder) -> EncodedExample:
    asked = (example.example_id, example.subtask, example.messages, example.assistant_prefix)
    return encoder.target(TargetExample(*asked, completion, example.tools))


def _context_length(model: PreTrainedModel | PeftModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2**31)


def _max_length(model: PreTrainedModel | PeftModel, settings: EvaluationSettings) -> int:
    return min(settings.max_length or _context_length(model), _context_length(model))


def _longest_reference(examples: Sequence[EvaluationExample], tokenizer: PreTrainedTokenizerBase) -> int:
    answers = {answer for example in examples for answer in example.answers}
    return SPARE_NEW_TOKENS + max(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers)


def _encode_requests(
    examples: Sequence[EvaluationExample], encoder: ChatEncoder
) -> tuple[list[str], dict[tuple[str, str], tuple[list[int], list[int]]]]:
    """Return each example's prompt text, and the ids of prompt and continuation that the harness must use for it.

    They are encoded as target examples are, so that training, loss, likelihoods and generation see the very same
    prompt; text that is tokenized again could differ from it at the seams.
    """
    prompts: list[str] = []
    encodings: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
    for example in examples:
        choices = {
            continuation: _split(_encode(example, continuation, encoder))
            for continuation in example.choices or (example.completion,)
        }
        prompt_ids, _ = choices[example.completion]
        prompts.append(str(encoder.tokenizer.decode(prompt_ids)))
        encodings |= {(prompts[-1], choice): (prompt_ids, ids) for choice, (_, ids) in choices.items()}
    return prompts, encodings


def _split(encoded: EncodedExample) -> tuple[list[int], list[int]]:
    """Split an encoded target into the ids before its first loss token and the rest."""
    start = int(np.argmax(np.asarray(encoded.labels) != IGNORED))
    ids = np.asarray(encoded.input_ids).tolist()
    return ids[:start], ids[start:]


def _output_and_answer(example: EvaluationExample, rule: AnswerRule, sample: Mapping[str, Any]) -> tuple[str, str]:
    """Return the generated text and the extracted answer of a logged sample."""
    if example.choices:
        output = example.choices[most_likely([responses[0] for responses in sample["resps"]])]
        return output, rule.extract(output)
    return sample["resps"][0][0], sample["filtered_resps"][0]
