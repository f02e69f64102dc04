"""From what lm-evaluation-harness logs to rows of samples and metrics.

Belongs here: reading logged samples and results. Not here: asking (`harness.py`), the tables' schemas and summaries
(`evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from less_assets.method.evaluation.harness import HarnessModel


def most_likely(results: Sequence[tuple[float, bool]]) -> int:
    """Return the index of the highest log-likelihood; the first of equal ones."""
    return int(np.argmax([result[0] for result in results]))


def sample_row(
    *,
    example_id: str,
    subtask: str,
    prompt: str,
    output: str,
    answer: str,
    reference: str,
    scores: Mapping[str, float],
    loss: float | None,
    loss_tokens: int,
) -> dict[str, Any]:
    """Return a row of `SAMPLE_SCHEMA`; the first of the scores is the sample's own."""
    metric, score = next(iter(scores.items()), (None, None))
    return {
        "example_id": example_id,
        "subtask": subtask,
        "prompt": prompt,
        "output": output,
        "answer": answer,
        "reference": reference,
        "metric": metric,
        "score": score,
        "correct": None if score is None else score == 1.0,
        "scores": [{"metric": key, "value": value} for key, value in scores.items()],
        "loss": loss,
        "loss_tokens": loss_tokens,
    }


def averaged_metrics(leaf: Task) -> set[str]:
    """Metrics that are plain means over samples; what is aggregated otherwise has no bootstrap over samples here."""
    from lm_eval.api.metrics import mean

    return {metric for metric, aggregation in leaf.aggregation().items() if aggregation is mean}


def logged_rows(
    name: str, leaf: Task, logged: Sequence[Mapping[str, Any]], averaged: set[str], lm: HarnessModel
) -> list[dict[str, Any]]:
    """Return rows of `SAMPLE_SCHEMA` from a leaf task's samples, logged once per document and filter."""
    by_document: dict[int, list[Mapping[str, Any]]] = {}
    for sample in logged:
        by_document.setdefault(sample["doc_id"], []).append(sample)
    groups = list(by_document.values())
    losses = lm.continuation_losses([_gold_pair(leaf, group[0]) for group in groups])
    records = []
    for group, (loss, loss_tokens) in zip(groups, losses, strict=True):
        scores = {}
        for sample in group:
            suffix = "" if sample is group[0] else f",{sample['filter']}"
            for metric in sample["metrics"]:
                if metric in averaged and isinstance(sample[metric], int | float | np.number):
                    scores[metric + suffix] = float(sample[metric])
        first = group[0]
        output, answer = _output_and_answer(leaf, first)
        target = first["target"]
        document = first["doc"] if isinstance(first["doc"], Mapping) else {}
        records.append(
            sample_row(
                example_id=str(document.get("example_id") or first["doc_hash"][:32]),
                subtask=str(document.get("subtask") or name),
                prompt=str(first["arguments"][0][0]),
                output=output,
                answer=answer,
                reference="\n".join(map(str, target))
                if isinstance(target, list)
                else _gold_pair(leaf, first)[1].strip(),
                scores=scores,
                loss=loss if loss_tokens else None,
                loss_tokens=loss_tokens,
            )
        )
    return records


def _output_and_answer(leaf: Task, sample: Mapping[str, Any]) -> tuple[str, str]:
    """Return output and answer of a logged sample: generated text, or the most likely continuation."""
    if leaf.OUTPUT_TYPE == "generate_until":
        return str(sample["resps"][0][0]), str(sample["filtered_resps"][0])
    if leaf.OUTPUT_TYPE == "multiple_choice":
        best = most_likely(sample["filtered_resps"])
        context, continuation = sample["arguments"][best][:2]
        chosen = context if getattr(leaf, "multiple_input", 0) else continuation
        return chosen, chosen.strip()
    return "", ""


def _gold_pair(leaf: Task, sample: Mapping[str, Any]) -> tuple[str, str]:
    """Return (context, reference continuation) of a logged sample, for its loss."""
    arguments, target = sample["arguments"], sample["target"]
    if leaf.OUTPUT_TYPE == "loglikelihood_rolling":
        return "", arguments[0][0]
    if leaf.OUTPUT_TYPE == "loglikelihood":
        return arguments[0][0], arguments[0][1]
    if leaf.OUTPUT_TYPE == "multiple_choice":
        gold = leaf.doc_to_text(sample["doc"]) if getattr(leaf, "multiple_input", 0) else target
        gold = gold[0] if isinstance(gold, list) else gold
        if isinstance(gold, str):
            gold = leaf.doc_to_choice(sample["doc"]).index(gold)
        return arguments[gold][0], arguments[gold][1]
    text = str(target[0] if isinstance(target, list) else target)
    return arguments[0][0], f"{leaf.config.target_delimiter}{text}"


def figure_rows(
    name: str, results: Mapping[str, Any], averaged: set[str], higher_is_better: Mapping[str, bool]
) -> list[dict[str, Any]]:
    """Return rows of `METRIC_SCHEMA` for the metrics that are no means over samples."""
    rows = []
    for key, value in results.items():
        metric, _, suffix = key.partition(",")
        if metric in higher_is_better and metric not in averaged and isinstance(value, int | float):
            rows.append(
                {
                    "metric": metric if suffix == "none" else key,
                    "subtask": name,
                    "value": float(value),
                    "low": None,
                    "high": None,
                    "n": int(results.get("sample_len") or 0),
                    "higher_is_better": higher_is_better[metric],
                    "primary": False,
                    "average": "samples",
                }
            )
    return rows
